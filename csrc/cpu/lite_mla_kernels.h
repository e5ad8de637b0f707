// LiteMLA from qkv on, for one instruction set: aggregation, state, normalisation and projection, tile by tile.
#pragma once

#include "gemm.h"
#include "lite_mla.h"
#include "multiscale_aggregate_kernels.h"
#include "relu_linear_attention_kernels.h"

namespace efficientvit_kernels::cpu::EVK_ISA {

template <class T>
struct LiteMlaScratch {
  LiteMlaScratch(Arena<T>& arena, const LiteMlaArgs& args, const TileGrid& grid)
      : ld(Scratch<T>::row_stride(args.head_dim)) {
    const int64_t rows = max_tile_rows(grid), cols = max_tile_cols(grid), pad = args.max_pad();
    planes = arena.take(Planes<T, T>::numel(args.head_dim, rows, cols, pad));
    row = arena.take((at_least(kTileTokens, cols + 2 * pad) + 16) * ld);
    for (T*& tile : column) tile = arena.take((ld + 1) * kAggregateLd);
    k_row = arena.take((kAggregateTokens + 16) * ld);
    for (T*& m : matrix) m = arena.take((ld + 1) * ld);
  }

  int64_t ld;
  T *planes, *row, *column[2], *k_row, *matrix[2];
};

template <class S>
static Tokens<const S> lite_mla_part(const LiteMlaArgs& args, int64_t b, int64_t g, Part part) {
  return tokens_of<const S>(args.qkv, args.height, args.width, b, (g % args.heads * 3 + part) * args.head_dim);
}

// The aggregation that group g uses, or null for scale 0.
static inline const AggregateScale* scale_of(const LiteMlaArgs& args, int64_t g) {
  return g < args.heads ? nullptr : &args.scales[g / args.heads - 1];
}

template <class T>
static PartWeights<T> part_weights(const LiteMlaArgs& args, int64_t g, Part part) {
  return PartWeights<T>(*scale_of(args, g), args.head_dim, g % args.heads * 3 + part);
}

// out[channel][token] = depthwise convolution of a part over one tile.
template <class S, class T>
static void filter_part(const LiteMlaArgs& args, const Tokens<const S>& part, const Region& region,
                        const PartWeights<T>& weights, const LiteMlaScratch<T>& scratch, T* out) {
  const Planes<S, T> planes(part, args.head_dim, region, weights.size / 2, args.height, args.width, scratch.planes,
                            scratch.row, scratch.ld);
  depthwise_part(planes, region, weights, out, kAggregateLd);
}

template <class T>
static void relu_rows(T* tile, int64_t ld, int64_t rows, int64_t cols, const T* bias) {
  for (int64_t r = 0; r < rows; ++r, tile += ld) {
    for (int64_t c = 0; c < cols; c += kLanes<T>) {
      const Vec<T> x = load(tile + c);
      store(tile + c, relu(bias ? x + broadcast(bias[r]) : x));
    }
  }
}

// The same for a tile in row form, whose bias runs along the row.
template <class T>
static void relu_tokens(T* rows, int64_t ld, int64_t tokens, int64_t channels, const T* bias) {
  for (int64_t n = 0; n < tokens; ++n, rows += ld) {
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      const Vec<T> x = load(rows + c);
      store(rows + c, relu(bias ? x + load(bias + c) : x));
    }
  }
}

template <class S>
static void lite_mla_state_kernel(const LiteMlaArgs& args, const TileGrid& grid, int64_t b, int64_t g, int64_t tile0,
                                  int64_t tile1, void* result, void* memory) {
  using T = Compute<S>;
  const int64_t D = args.head_dim, W = args.width;
  Arena<T> arena(memory);
  const LiteMlaScratch<T> scratch(arena, args, grid);
  const int64_t ld = scratch.ld;
  T *k_column = scratch.column[0], *v_column = scratch.column[1], *k_row = scratch.k_row, *sum = scratch.matrix[0];
  const auto k = lite_mla_part<S>(args, b, g, kK);
  const auto v = lite_mla_part<S>(args, b, g, kV);
  clear_matrix(sum, D, ld);
  // A last row of ones in v sums k' beside v k'^T.
  for (int64_t i = 0; i < kAggregateTokens; ++i) v_column[D * kAggregateLd + i] = T(1);

  for (int64_t tile = tile0; tile < tile1; ++tile) {
    const Region region = grid.region(tile);
    const int64_t count = region.tokens();
    if (scale_of(args, g)) {
      const auto weights = part_weights<T>(args, g, kK);
      filter_part<S>(args, k, region, weights, scratch, k_column);
      product<T, 1, false>(count, D, D, k_column, kAggregateLd, weights.pointwise_t, weights.ld, k_row, ld);
      relu_tokens(k_row, ld, count, D, weights.bias_or_null());
      filter_part<S>(args, v, region, part_weights<T>(args, g, kV), scratch, v_column);
    } else {
      load_region<Load::kRelu>(k, D, region, W, k_column, kAggregateLd, scratch.row, ld);
      transpose(k_column, kAggregateLd, D, count, k_row, ld);
      load_region<Load::kPlain>(v, D, region, W, v_column, kAggregateLd, scratch.row, ld);
    }
    product<T, kAggregateLd, true>(D + 1, count, D, v_column, 1, k_row, ld, sum, ld);
  }
  store_matrix(sum, ld, D, result);
}

// --- between the passes ---------------------------------------------------------------------------------------------

template <class T>
static T* lite_mla_state(const LiteMlaArgs& args, int64_t b, int64_t g) {
  return static_cast<T*>(args.state) + (b * args.groups() + g) * args.state_numel();
}

template <class S>
static void lite_mla_finish_kernel(const LiteMlaArgs& args, int64_t b, int64_t g, void* memory) {
  using T = Compute<S>;
  const int64_t D = args.head_dim, K = args.width_k();
  const TileGrid grid(args.height, args.width, aggregate_tokens(args.width));
  Arena<T> arena(memory);
  const LiteMlaScratch<T> scratch(arena, args, grid);
  const int64_t ld = scratch.ld;
  T *raw = scratch.matrix[0], *state = scratch.matrix[1], *dense = lite_mla_state<T>(args, b, g);
  load_matrix(dense, D, raw, ld);
  const T* kv = raw;
  if (scale_of(args, g)) {
    const auto weights = part_weights<T>(args, g, kV);
    product<T, 1, false>(D, D, D, weights.pointwise_t, weights.ld, raw, ld, state, ld);
    const T* z = raw + D * ld;
    if (weights.has_pointwise_bias) {
      for (int64_t d = 0; d < D; ++d) {
        for (int64_t j = 0; j < D; ++j) state[d * ld + j] += weights.pointwise_bias[d] * z[j];
      }
    }
    __builtin_memcpy(state + D * ld, z, D * sizeof(T));
    store_matrix(state, ld, D, dense);
    kv = state;
  }
  if (args.folded == nullptr) return;
  // Panel by panel: folded[j, m] = sum_d KV[d, j] W[m, d]; a panel of W^T is a matrix of kPanelLd columns.
  const int64_t panels = row_panels(args.out_channels), panel_numel = panel_depth(K) * kPanelLd;
  const T* weight = static_cast<const T*>(args.packed) + g * D * kPanelLd;
  T* folded = static_cast<T*>(args.folded) + b * args.folded_numel + g * D * kPanelLd;
  for (int64_t p = 0; p < panels; ++p) {
    product<T, 1, false>(D, D, kPanelLd, kv, ld, weight + p * panel_numel, kPanelLd, folded + p * panel_numel,
                         kPanelLd);
  }
}

// --- query and projection -------------------------------------------------------------------------------------------

template <class S>
static void lite_mla_query_kernel(const LiteMlaArgs& args, const TileGrid& grid, int64_t b, int64_t g, int64_t tile,
                                  void* packed_cols, void* memory) {
  using T = Compute<S>;
  const int64_t D = args.head_dim, K = args.width_k();
  Arena<T> arena(memory);
  const LiteMlaScratch<T> scratch(arena, args, grid);
  const int64_t ld = scratch.ld;
  T *q = scratch.column[0], *other = scratch.column[1], *state = scratch.matrix[0], *state_t = scratch.matrix[1];
  const auto part = lite_mla_part<S>(args, b, g, kQ);
  const Region region = grid.region(tile);
  const int64_t count = region.tokens();
  if (scale_of(args, g)) {
    const auto weights = part_weights<T>(args, g, kQ);
    filter_part<S>(args, part, region, weights, scratch, other);
    product<T, 1, false>(D, D, count, weights.pointwise_t, weights.ld, other, kAggregateLd, q, kAggregateLd);
    relu_rows(q, kAggregateLd, D, count, weights.bias_or_null());
  } else {
    load_region<Load::kRelu>(part, D, region, args.width, q, kAggregateLd, scratch.row, ld);
  }

  load_matrix(lite_mla_state<T>(args, b, g), D, state, ld);
  T *att = q, *den = other + D * kAggregateLd;
  if (args.folded) {
    product<T, 1, false>(1, D, count, state + D * ld, 1, q, kAggregateLd, den, kAggregateLd);
  } else {
    transpose(state, ld, D + 1, D, state_t, ld);
    product<T, 1, false>(D + 1, D, count, state_t, ld, q, kAggregateLd, other, kAggregateLd);
    att = other;
  }
  add_to_row(den, count, static_cast<T>(args.eps));
  const T* factors = divide_or_factors(att, kAggregateLd, D, count, den);
  T* packed = static_cast<T*>(packed_cols);
  for (int64_t d = 0; d < D; ++d) {
    const T* row = att + d * kAggregateLd;
    scatter_row<T>(g * D + d, count, K, packed,
                   [&](int64_t n) { return factors ? load(row + n) * load(factors + n) : load(row + n); });
  }
}

template <class S>
static void lite_mla_project_kernel(const LiteMlaArgs& args, const TileGrid& grid, int64_t b, int64_t tile, int64_t p0,
                                    int64_t p1, const WeightRows& rows, const void* packed_cols, void* memory) {
  using T = Compute<S>;
  const int64_t M = args.out_channels, K = args.width_k(), H = args.height, W = args.width;
  const Region region = grid.region(tile);
  Tokens<const S> residual{nullptr, 0, 0, 0, 0};
  if (args.residual.data) residual = tokens_of<const S>(args.residual, H, W, b, 0);
  const Epilogue<S> epilogue{static_cast<const T*>(args.scale), static_cast<const T*>(args.shift), residual};
  const ImageWriter<S> writer(tokens_of<S>(args.y, H, W, b, 0), epilogue, region, W, first_row(M, p0), first_row(M, p1),
                              static_cast<T*>(memory));
  multiply<T>(rows, M, p0, p1, K, static_cast<const T*>(packed_cols), region.tokens(), writer);
  writer.finish();
}

// --- table ----------------------------------------------------------------------------------------------------------

template <class S>
static LiteMlaKernels lite_mla_kernels_for() {
  using T = Compute<S>;
  return {lite_mla_state_kernel<S>,
          lite_mla_finish_kernel<S>,
          lite_mla_query_kernel<S>,
          lite_mla_project_kernel<S>,
          [](const LiteMlaArgs& args, const TileGrid& grid) -> int64_t {
            Arena<T> arena(nullptr);
            const LiteMlaScratch<T> scratch(arena, args, grid);
            return arena.used * static_cast<int64_t>(sizeof(T));
          },
          [](const LiteMlaArgs&, const TileGrid& grid, int64_t row_panels) -> int64_t {
            return ImageWriter<S>::scratch_numel(row_panels * kPanelRows, max_tile_rows(grid) * max_tile_cols(grid)) *
                   static_cast<int64_t>(sizeof(T));
          },
          packed_cols_numel<T>,
          packed_rows_numel,
          kPanelRows};
}

LiteMlaKernels lite_mla_kernels(StorageType type) {
  switch (type) {
    case StorageType::kDouble:
      return lite_mla_kernels_for<double>();
    case StorageType::kHalf:
      return lite_mla_kernels_for<Half>();
    case StorageType::kBFloat16:
      return lite_mla_kernels_for<BFloat16>();
    default:
      return lite_mla_kernels_for<float>();
  }
}

}  // namespace efficientvit_kernels::cpu::EVK_ISA
