// Multi-scale aggregation for one instruction set: depthwise and pointwise convolution of one tile after the other,
// with nothing in memory between them.
#pragma once

#include "depthwise.h"
#include "multiscale_aggregate.h"

namespace efficientvit_kernels::cpu::EVK_ISA {

// Row stride of a tile of kAggregateTokens; not a power of two, as kTileLd.
inline constexpr int kAggregateLd = static_cast<int>(kAggregateTokens) + 16;

// Rows of a part's tiles and matrices: whole vectors, and whole blocks of transpose_lanes_by_4.
static inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// The weights of one part and scale in the compute type, as prepare_part leaves them in memory.
template <class T>
struct PartWeights {
  PartWeights(T* memory, int64_t head_dim, int64_t size) : D(head_dim), ld(padded_dim(head_dim)), size(size) {
    Arena<T> arena(memory);
    depthwise = arena.take(D * size * size);
    depthwise_bias = arena.take(ld);
    pointwise = arena.take(ld * ld);
    pointwise_t = arena.take(ld * ld);
    pointwise_bias = arena.take(ld);
    numel = arena.used;
  }
  PartWeights(const AggregateScale& scale, int64_t head_dim, int64_t part)
      : PartWeights(nullptr, head_dim, scale.size) {
    *this = PartWeights(static_cast<T*>(const_cast<void*>(scale.prepared)) + part * numel, head_dim, size);
    has_pointwise_bias = scale.pointwise_bias != nullptr;
  }

  const T* taps(int64_t channel) const { return depthwise + channel * size * size; }
  const T* bias_or_null() const { return has_pointwise_bias ? pointwise_bias : nullptr; }

  int64_t D, ld, size, numel = 0;
  bool has_pointwise_bias = false;
  T *depthwise, *depthwise_bias, *pointwise, *pointwise_t, *pointwise_bias;
};

template <class S>
static void prepare_part(const AggregateScale& scale, int64_t head_dim, int64_t part, void* prepared) {
  using T = Compute<S>;
  const int64_t D = head_dim, taps = scale.size * scale.size, first = part * D;
  T* base = static_cast<T*>(prepared);
  const PartWeights<T> out(base + part * PartWeights<T>(nullptr, D, scale.size).numel, D, scale.size);
  clear(out.depthwise, out.numel);
  const S* depthwise = static_cast<const S*>(scale.depthwise) + first * taps;
  const S* pointwise = static_cast<const S*>(scale.pointwise) + first * D;
  for (int64_t i = 0; i < D * taps; ++i) out.depthwise[i] = to_compute(depthwise[i]);
  for (int64_t o = 0; o < D; ++o) {
    for (int64_t i = 0; i < D; ++i) out.pointwise[o * out.ld + i] = to_compute(pointwise[o * D + i]);
    for (int64_t i = 0; i < D; ++i) out.pointwise_t[i * out.ld + o] = out.pointwise[o * out.ld + i];
  }
  for (int64_t i = 0; i < D; ++i) {
    if (scale.depthwise_bias)
      out.depthwise_bias[i] = to_compute(static_cast<const S*>(scale.depthwise_bias)[first + i]);
    if (scale.pointwise_bias)
      out.pointwise_bias[i] = to_compute(static_cast<const S*>(scale.pointwise_bias)[first + i]);
  }
}

static inline int64_t max_tile_rows(const TileGrid& grid) {
  return (grid.height + grid.down_rows - 1) / grid.down_rows;
}
static inline int64_t max_tile_cols(const TileGrid& grid) {
  return (grid.width + grid.down_columns - 1) / grid.down_columns;
}

// Depthwise convolution of every channel of a part: out[channel][token], channels `ld` apart.
template <class S, class T>
static void depthwise_part(const Planes<S, T>& planes, const Region& region, const PartWeights<T>& weights, T* out,
                           int64_t ld) {
  for (int64_t c = 0; c < weights.D; ++c) {
    depthwise(planes.at(c), planes.ld(), region.rows(), region.cols(), weights.taps(c), weights.size,
              weights.depthwise_bias[c], out + c * ld, region.cols());
  }
}

// --- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct AggregateScratch {
  AggregateScratch(Arena<T>& arena, const MultiscaleAggregateArgs& args, const TileGrid& grid)
      : ld_row(padded_dim(args.head_dim)) {
    const int64_t rows = max_tile_rows(grid), cols = max_tile_cols(grid), pad = args.max_pad();
    planes = arena.take(Planes<T, T>::numel(args.head_dim, rows, cols, pad));
    row = arena.take((at_least(kTileTokens, cols + 2 * pad) + 16) * ld_row);
    filtered = arena.take((ld_row + 1) * kAggregateLd);
    out = arena.take((ld_row + 1) * kAggregateLd);
  }

  int64_t ld_row;
  T *planes, *row, *filtered, *out;
};

template <class S>
static void aggregate_kernel(const MultiscaleAggregateArgs& args, const TileGrid& grid,
                             const MultiscaleAggregateTask& task, void* memory) {
  using T = Compute<S>;
  const int64_t D = args.head_dim, H = args.height, W = args.width;
  Arena<T> arena(memory);
  const AggregateScratch<T> scratch(arena, args, grid);
  const auto qkv = tokens_of<const S>(args.qkv, H, W, task.b, task.part * D);
  for (int64_t s = 0; s < args.num_scales; ++s) {
    const AggregateScale& scale = args.scales[s];
    const PartWeights<T> weights(scale, D, task.part);
    const auto out = tokens_of<S>(scale.out, H, W, task.b, task.part * D);
    for (int64_t tile = task.tile0; tile < task.tile1; ++tile) {
      const Region region = grid.region(tile);
      const Planes<S, T> planes(qkv, D, region, scale.pad(), H, W, scratch.planes, scratch.row, scratch.ld_row);
      depthwise_part(planes, region, weights, scratch.filtered, kAggregateLd);
      product<T, 1, false>(D, D, region.tokens(), weights.pointwise_t, weights.ld, scratch.filtered, kAggregateLd,
                           scratch.out, kAggregateLd);
      if (scale.pointwise_bias) {
        for (int64_t o = 0; o < D; ++o) {
          add_to_row(scratch.out + o * kAggregateLd, region.tokens(), weights.pointwise_bias[o]);
        }
      }
      store_region(scratch.out, kAggregateLd, out, D, region, W, scratch.row, scratch.ld_row);
    }
  }
}

// --- backward -------------------------------------------------------------------------------------------------------
//
// With g = grad_out and grad_u = P^T g:
//   grad_qkv[i, m] = sum_tap W[i, tap] grad_u[i, m - tap],   grad_W[i, tap] = sum_n grad_u[i, n] qkv[i, n + tap],
//   grad_P[o, i] = sum_n g[o, n] u[i, n],   grad_b[i] = sum_n grad_u[i, n],   grad_c[o] = sum_n g[o, n].
// grad_u is computed for the tile and its halo.

template <class T>
struct AggregateGradScratch {
  AggregateGradScratch(Arena<T>& arena, const MultiscaleAggregateArgs& args, const TileGrid& grid)
      : ld_row(padded_dim(args.head_dim)) {
    const int64_t rows = max_tile_rows(grid), cols = max_tile_cols(grid), pad = args.max_pad();
    const int64_t size = 2 * pad + 1;
    tokens = rows * cols;
    ld = (tokens + 31) / 16 * 16;
    ld_halo = ((rows + 2 * pad) * (cols + 2 * pad) + 31) / 16 * 16;
    flipped = arena.take(size * size);
    planes = arena.take(Planes<T, T>::numel(args.head_dim, rows, cols, pad));
    plane = arena.take(plane_numel(rows, cols, pad));
    row = arena.take((at_least(kTileTokens, cols + 2 * pad) + 16) * ld_row);
    grad_out = arena.take((ld_row + 1) * ld_halo);
    grad_filtered = arena.take((ld_row + 1) * ld_halo);
    filtered = arena.take((ld_row + 1) * ld);
    grad = arena.take((ld_row + 1) * ld);
    grad_one = arena.take(ld);
    rows_out = arena.take((tokens + 16) * ld_row);
    rows_filtered = arena.take((tokens + 16) * ld_row);
    int64_t sums_numel = 0;
    for (int64_t s = 0; s < args.num_scales; ++s) {
      sums_numel += ld_row * ld_row + args.head_dim * (args.scales[s].size * args.scales[s].size + 2) * kLanes<T>;
    }
    sums = arena.take(sums_numel);
  }

  int64_t ld_row, tokens, ld, ld_halo;
  T *flipped, *planes, *plane, *row, *grad_out, *grad_filtered, *filtered, *grad, *grad_one, *rows_out, *rows_filtered,
      *sums;
};

// Sums of one part and scale over the tiles of a task. All but the pointwise ones are kept as vectors of partial sums.
template <class T>
struct PartSums {
  PartSums(T* memory, int64_t head_dim, int64_t size)
      : D(head_dim), taps(size * size), ld(padded_dim(head_dim)), pointwise(memory) {
    depthwise = reinterpret_cast<Vec<T>*>(memory + ld * ld);
    depthwise_bias = depthwise + D * taps;
    pointwise_bias = depthwise_bias + D;
  }
  int64_t numel() const { return ld * ld + D * (taps + 2) * kLanes<T>; }

  // Dense, in the order of MultiscaleAggregateTask::grads; returns what follows them.
  T* write(T* out) const {
    for (int64_t o = 0; o < D; ++o, out += D) __builtin_memcpy(out, pointwise + o * ld, D * sizeof(T));
    for (int64_t i = 0; i < D * taps; ++i) *out++ = sum_of_lanes<T>(depthwise[i]);
    for (int64_t i = 0; i < D; ++i) *out++ = sum_of_lanes<T>(depthwise_bias[i]);
    for (int64_t i = 0; i < D; ++i) *out++ = sum_of_lanes<T>(pointwise_bias[i]);
    return out;
  }

  int64_t D, taps, ld;
  T* pointwise;
  Vec<T>*depthwise, *depthwise_bias, *pointwise_bias;
};

template <class T>
static Vec<T> sum_of_rows(const T* p, int64_t ld, int64_t rows, int64_t cols) {
  Vec<T> sum{};
  for (int64_t r = 0; r < rows; ++r, p += ld) {
    for (int64_t c = 0; c < cols; c += kLanes<T>) {
      sum += cols - c < kLanes<T> ? load_compute(p + c, cols - c) : load(p + c);
    }
  }
  return sum;
}

// A channel of grad_u, given for the part of the halo that lies in the image, as the plane of a region. Whole vectors:
// what they write past a row's end, the next row overwrites.
template <class T>
static void plane_from_halo(const T* compact, const Region& halo, const Region& region, int64_t pad, T* plane) {
  const int64_t ld = region.cols() + 2 * pad, skip = halo.c0 - (region.c0 - pad), take = halo.cols();
  for (int64_t r = region.r0 - pad; r < region.r1 + pad; ++r, plane += ld) {
    if (r < halo.r0 || r >= halo.r1) {
      clear_ahead(plane, ld);
      continue;
    }
    clear_ahead(plane, skip);
    const T* row = compact + (r - halo.r0) * take;
    for (int64_t i = 0; i < take; i += kLanes<T>) store(plane + skip + i, load(row + i));
    clear_ahead(plane + skip + take, ld - skip - take);
  }
}

// rows_out[token][channel] for the tokens of `region` inside the compact tile of `halo`.
template <class T>
static void transpose_region(const T* tile, int64_t ld, const Region& halo, const Region& region, int64_t channels,
                             T* rows_out, int64_t ld_row) {
  const T* first = tile + (region.r0 - halo.r0) * halo.cols() + region.c0 - halo.c0;
  if (region.cols() == halo.cols()) {
    transpose(first, ld, channels, region.tokens(), rows_out, ld_row);
    return;
  }
  for (int64_t r = 0; r < region.rows(); ++r) {
    transpose(first + r * halo.cols(), ld, channels, region.cols(), rows_out + r * region.cols() * ld_row, ld_row);
  }
}

static inline Region halo_of(const Region& region, int64_t pad, int64_t height, int64_t width) {
  return {region.r0 < pad ? 0 : region.r0 - pad, region.r1 + pad < height ? region.r1 + pad : height,
          region.c0 < pad ? 0 : region.c0 - pad, region.c1 + pad < width ? region.c1 + pad : width};
}

template <class T>
static void add_into(T* into, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(into + i, load(into + i) + load(from + i));
}

template <class S>
static void aggregate_grad_kernel(const MultiscaleAggregateArgs& args, const TileGrid& grid,
                                  const MultiscaleAggregateTask& task, void* memory) {
  using T = Compute<S>;
  const int64_t D = args.head_dim, H = args.height, W = args.width;
  Arena<T> arena(memory);
  const AggregateGradScratch<T> scratch(arena, args, grid);
  const int64_t ld = scratch.ld, ld_halo = scratch.ld_halo, ld_row = scratch.ld_row;
  const auto qkv = tokens_of<const S>(args.qkv, H, W, task.b, task.part * D);
  const bool needs_qkv = args.grad_qkv.data != nullptr;
  int64_t sums_numel = 0;
  for (int64_t s = 0; s < args.num_scales; ++s) sums_numel += PartSums<T>(nullptr, D, args.scales[s].size).numel();
  clear(scratch.sums, sums_numel);

  for (int64_t tile = task.tile0; tile < task.tile1; ++tile) {
    const Region region = grid.region(tile);
    const int64_t rows = region.rows(), cols = region.cols(), count = region.tokens();
    const auto grad_qkv = tokens_of<S>(args.grad_qkv, H, W, task.b, task.part * D);
    if (needs_qkv && args.accumulate) {
      const auto before = tokens_of<const S>(args.grad_qkv, H, W, task.b, task.part * D);
      load_region<Load::kPlain>(before, D, region, W, scratch.grad, ld, scratch.row, ld_row);
    } else {
      for (int64_t c = 0; c < D; ++c) clear(scratch.grad + c * ld, count);
    }
    T* sums_memory = scratch.sums;
    for (int64_t s = 0; s < args.num_scales; ++s) {
      const AggregateScale& scale = args.scales[s];
      const int64_t pad = scale.pad(), size = scale.size;
      PartSums<T> sums(sums_memory, D, size);
      sums_memory += sums.numel();
      const PartWeights<T> weights(scale, D, task.part);
      const Region halo = halo_of(region, pad, H, W);
      const auto grad_out = tokens_of<const S>(scale.out, H, W, task.b, task.part * D);
      load_region<Load::kPlain>(grad_out, D, halo, W, scratch.grad_out, ld_halo, scratch.row, ld_row);
      product<T, 1, false>(D, D, halo.tokens(), weights.pointwise, weights.ld, scratch.grad_out, ld_halo,
                           scratch.grad_filtered, ld_halo);
      if (needs_qkv) {
        for (int64_t c = 0; c < D; ++c) {
          for (int64_t i = 0; i < size * size; ++i) scratch.flipped[i] = weights.taps(c)[size * size - 1 - i];
          plane_from_halo(scratch.grad_filtered + c * ld_halo, halo, region, pad, scratch.plane);
          depthwise(scratch.plane, cols + 2 * pad, rows, cols, scratch.flipped, size, T(0), scratch.grad_one, cols);
          add_into(scratch.grad + c * ld, scratch.grad_one, count);
        }
      }
      if (!args.needs_weights) continue;
      const int64_t inner = (region.r0 - halo.r0) * halo.cols() + region.c0 - halo.c0;
      const Planes<S, T> planes(qkv, D, region, pad, H, W, scratch.planes, scratch.row, ld_row);
      for (int64_t c = 0; c < D; ++c) {
        const T* plane = planes.at(c);
        const T* grad_u = scratch.grad_filtered + c * ld_halo + inner;
        depthwise(plane, planes.ld(), rows, cols, weights.taps(c), size, weights.depthwise_bias[c],
                  scratch.filtered + c * ld, cols);
        depthwise_weight_grad(grad_u, halo.cols(), plane, planes.ld(), rows, cols, size,
                              sums.depthwise + c * size * size);
        sums.depthwise_bias[c] += sum_of_rows(grad_u, halo.cols(), rows, cols);
        sums.pointwise_bias[c] += sum_of_rows(scratch.grad_out + c * ld_halo + inner, halo.cols(), rows, cols);
      }
      transpose_region(scratch.grad_out, ld_halo, halo, region, D, scratch.rows_out, ld_row);
      transpose(scratch.filtered, ld, D, count, scratch.rows_filtered, ld_row);
      // In short chains of additions: the sum over an image would otherwise carry the error of one long chain.
      for (int64_t n = 0; n < count; n += kTileTokens) {
        const int64_t depth = count - n < kTileTokens ? count - n : kTileTokens;
        product<T, 1, true>(D, depth, D, scratch.rows_out + n * ld_row, ld_row, scratch.rows_filtered + n * ld_row,
                            ld_row, sums.pointwise, ld_row);
      }
    }
    if (needs_qkv) store_region(scratch.grad, ld, grad_qkv, D, region, W, scratch.row, ld_row);
  }
  if (!args.needs_weights) return;
  T *sums_memory = scratch.sums, *grads = static_cast<T*>(task.grads);
  for (int64_t s = 0; s < args.num_scales; ++s) {
    const PartSums<T> sums(sums_memory, D, args.scales[s].size);
    sums_memory += sums.numel();
    grads = sums.write(grads);
  }
}

// --- table ----------------------------------------------------------------------------------------------------------

template <class S, template <class> class Scratch>
static int64_t aggregate_scratch_bytes(const MultiscaleAggregateArgs& args, const TileGrid& grid) {
  Arena<Compute<S>> arena(nullptr);
  const Scratch<Compute<S>> scratch(arena, args, grid);
  return arena.used * static_cast<int64_t>(sizeof(Compute<S>));
}

template <class S>
static MultiscaleAggregateKernels aggregate_kernels_for() {
  return {
      aggregate_kernel<S>,
      aggregate_grad_kernel<S>,
      aggregate_scratch_bytes<S, AggregateScratch>,
      aggregate_scratch_bytes<S, AggregateGradScratch>,
      prepare_part<S>,
      [](int64_t head_dim, int64_t size) -> int64_t { return PartWeights<Compute<S>>(nullptr, head_dim, size).numel; }};
}

MultiscaleAggregateKernels multiscale_aggregate_kernels(StorageType type) {
  switch (type) {
    case StorageType::kDouble:
      return aggregate_kernels_for<double>();
    case StorageType::kHalf:
      return aggregate_kernels_for<Half>();
    case StorageType::kBFloat16:
      return aggregate_kernels_for<BFloat16>();
    default:
      return aggregate_kernels_for<float>();
  }
}

}  // namespace efficientvit_kernels::cpu::EVK_ISA
