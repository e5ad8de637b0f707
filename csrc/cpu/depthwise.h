// Depthwise convolution of one channel of a tile, and its gradients, for one instruction set.
//
// A "plane" is one channel of a region with a halo: rows [r0 - pad, r1 + pad), columns [c0 - pad, c1 + pad), zeros
// where the image ends, rows region.cols() + 2 * pad apart. Vectors read past the last column: into the next row, and
// past the last row into kPlaneSlack further elements. Those lanes are never stored.
#pragma once

#include "tile.h"

namespace efficientvit_kernels::cpu::EVK_ISA {

inline constexpr int64_t kPlaneSlack = 64;

static inline int64_t plane_numel(int64_t rows, int64_t cols, int64_t pad) {
  return ((rows + 2 * pad) * (cols + 2 * pad) + kPlaneSlack + 15) / 16 * 16;
}

// --- loading planes -------------------------------------------------------------------------------------------------

template <class T>
static inline void clear(T* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = T(0);
}

// What lies between the halo of a region and the image: `skip` columns outside on the left, `take` inside, `rest`
// outside.
struct HaloColumns {
  HaloColumns(const Region& region, int64_t pad, int64_t width) {
    const int64_t lo = region.c0 - pad, hi = region.c1 + pad;
    first = lo < 0 ? 0 : lo;
    skip = first - lo;
    take = (hi < width ? hi : width) - first;
    rest = hi - lo - skip - take;
  }
  int64_t first, skip, take, rest;
};

// As clear(), in whole vectors: what they reach beyond `count` is written afterwards.
template <class T>
static inline void clear_ahead(T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(p + i, Vec<T>{});
}

// One channel, whatever its strides. Rows come in order, so what one writes past its end, the next one overwrites.
template <class S, class T>
static void load_plane(const S* channel, int64_t stride_h, int64_t stride_w, const Region& region, int64_t pad,
                       int64_t height, int64_t width, T* plane) {
  const HaloColumns columns(region, pad, width);
  const int64_t ld = region.cols() + 2 * pad;
  for (int64_t r = region.r0 - pad; r < region.r1 + pad; ++r, plane += ld) {
    if (r < 0 || r >= height) {
      clear_ahead(plane, ld);
      continue;
    }
    const S* row = channel + r * stride_h + columns.first * stride_w;
    T* dst = plane + columns.skip;
    clear_ahead(plane, columns.skip);
    if (stride_w == 1) {
      convert_in<Load::kPlain>(row, columns.take, dst);
    } else {
      for (int64_t i = 0; i < columns.take; ++i) dst[i] = to_compute(row[i * stride_w]);
    }
    clear_ahead(dst + columns.take, columns.rest);
  }
}

// All channels of a part whose channels are contiguous (channels_last). scratch holds a row tile of cols + 2 * pad
// tokens.
template <class S, class T>
static void load_planes_by_rows(const Tokens<const S>& tokens, int64_t channels, const Region& region, int64_t pad,
                                int64_t height, int64_t width, T* planes, int64_t plane_stride, T* scratch,
                                int64_t ld_scratch) {
  const HaloColumns columns(region, pad, width);
  const int64_t ld = region.cols() + 2 * pad;
  for (int64_t r = region.r0 - pad; r < region.r1 + pad; ++r) {
    T* row = planes + (r - region.r0 + pad) * ld;
    const bool inside = r >= 0 && r < height;
    if (inside) {
      load_row_tile<Load::kPlain>(tokens, channels, r * width + columns.first, columns.take, scratch, ld_scratch);
      // Whole blocks: what they write past the last column is cleared below, or written by the next row.
      transpose(scratch, ld_scratch, columns.take, channels, row + columns.skip, plane_stride);
    }
    for (int64_t c = 0; c < channels; ++c, row += plane_stride) {
      clear(row, inside ? columns.skip : ld);
      if (inside) clear(row + columns.skip + columns.take, columns.rest);
    }
  }
}

// The planes of one part (q, k or v of a head), one after the other: each is loaded when it is asked for, so that it
// stays in the first-level cache, except in channels_last, where all come together.
template <class S, class T>
struct Planes {
  // memory: numel(...) values; scratch: a row tile.
  Planes(const Tokens<const S>& tokens, int64_t channels, const Region& region, int64_t pad, int64_t height,
         int64_t width, T* memory, T* scratch, int64_t ld_scratch)
      : tokens(tokens), region(region), pad(pad), height(height), width(width), memory(memory) {
    by_rows = tokens.stride_w != 1 && tokens.stride_c == 1;
    stride = by_rows ? plane_numel(region.rows(), region.cols(), pad) : 0;
    if (by_rows) {
      load_planes_by_rows(tokens, channels, region, pad, height, width, memory, stride, scratch, ld_scratch);
    }
  }

  // Rows of `channels` are written in blocks of 4.
  static int64_t numel(int64_t channels, int64_t rows, int64_t cols, int64_t pad) {
    return (channels + 3) / 4 * 4 * plane_numel(rows, cols, pad);
  }

  const T* at(int64_t channel) const {
    if (!by_rows) {
      load_plane(tokens.data + channel * tokens.stride_c, tokens.stride_h, tokens.stride_w, region, pad, height, width,
                 memory);
    }
    return memory + channel * stride;
  }

  int64_t ld() const { return region.cols() + 2 * pad; }

  Tokens<const S> tokens;
  Region region;
  int64_t pad, height, width;
  T* memory;
  int64_t stride;
  bool by_rows;
};

// --- the convolution ------------------------------------------------------------------------------------------------

// Most of these loads cross a cache line and cost two: the compiler must not repeat one for every use.
template <class V>
static inline void keep_in_register(V& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#endif
}

// R rows of V vectors. kSize is the kernel size where it is known at compile time, else 0 and `size` counts. Every
// output sums its taps column by column, whatever R and V.
template <class T, int kSize, int R, int V>
static void depthwise_block(const T* in, int64_t ld_in, const T* weights, int64_t size, T bias, T* out, int64_t ld_out,
                            int64_t last) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) acc[r][j] = broadcast(bias);
  }
  if constexpr (kSize > 0) {
    for (int dx = 0; dx < kSize; ++dx) {
      Vec<T> column[kSize];  // of weights, in registers: with few vectors a row, loads are what limits
#pragma GCC unroll 8
      for (int dy = 0; dy < kSize; ++dy) column[dy] = broadcast(weights[dy * kSize + dx]);
#pragma GCC unroll 32
      for (int y = 0; y < R + kSize - 1; ++y) {
        Vec<T> row[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) {
          row[j] = load(in + y * ld_in + dx + j * L);
          keep_in_register(row[j]);
        }
#pragma GCC unroll 32
        for (int r = y < kSize ? 0 : y - kSize + 1; r <= (y < R ? y : R - 1); ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < V; ++j) acc[r][j] += column[y - r] * row[j];
        }
      }
    }
  } else {
    for (int64_t dx = 0; dx < size; ++dx) {
      for (int64_t dy = 0; dy < size; ++dy) {
        const Vec<T> w = broadcast(weights[dy * size + dx]);
        for (int r = 0; r < R; ++r) {
          for (int j = 0; j < V; ++j) acc[r][j] += w * load(in + (r + dy) * ld_in + dx + j * L);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, out += ld_out) {
    for (int j = 0; j + 1 < V; ++j) store(out + j * L, acc[r][j]);
    if (last == L) {
      store(out + (V - 1) * L, acc[r][V - 1]);
    } else {
      store_compute(out + (V - 1) * L, acc[r][V - 1], last);
    }
  }
}

// At least eight sums in flight hide the latency of an addition; more rows at once share more loads.
template <int V>
inline constexpr int kMaxDepthwiseRows = kVecRegisters == 32 ? (V == 1 ? 14 : 16 / V) : 8 / V;

template <class T, int kSize, int V, int R = kMaxDepthwiseRows<V>>
static inline void depthwise_rows(int64_t rows, const T* in, int64_t ld_in, const T* weights, int64_t size, T bias,
                                  T* out, int64_t ld_out, int64_t last) {
  if constexpr (R > 0) {
    if (rows == R) {
      depthwise_block<T, kSize, R, V>(in, ld_in, weights, size, bias, out, ld_out, last);
    } else {
      depthwise_rows<T, kSize, V, R - 1>(rows, in, ld_in, weights, size, bias, out, ld_out, last);
    }
  }
}

template <class T, int kSize, int V>
static void depthwise_columns(int64_t rows, const T* in, int64_t ld_in, const T* weights, int64_t size, T bias, T* out,
                              int64_t ld_out, int64_t last) {
  const int64_t blocks = (rows + kMaxDepthwiseRows<V> - 1) / kMaxDepthwiseRows<V>;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t r0 = rows * block / blocks, r1 = rows * (block + 1) / blocks;
    depthwise_rows<T, kSize, V>(r1 - r0, in + r0 * ld_in, ld_in, weights, size, bias, out + r0 * ld_out, ld_out, last);
  }
}

template <class T, int kSize>
static void depthwise_sized(const T* in, int64_t ld_in, int64_t rows, int64_t cols, const T* weights, int64_t size,
                            T bias, T* out, int64_t ld_out) {
  constexpr int L = kLanes<T>;
  constexpr int kWide = kVecRegisters == 32 ? 4 : 2;
  const int64_t vectors = (cols + L - 1) / L;
  int64_t v = 0;
  auto last = [&](int64_t count) { return v + count == vectors ? cols - (vectors - 1) * L : L; };
  for (; v + kWide <= vectors; v += kWide) {
    depthwise_columns<T, kSize, kWide>(rows, in + v * L, ld_in, weights, size, bias, out + v * L, ld_out, last(kWide));
  }
  if (kWide == 4 && v + 2 <= vectors) {
    depthwise_columns<T, kSize, 2>(rows, in + v * L, ld_in, weights, size, bias, out + v * L, ld_out, last(2));
    v += 2;
  }
  if (v < vectors) {
    depthwise_columns<T, kSize, 1>(rows, in + v * L, ld_in, weights, size, bias, out + v * L, ld_out, last(1));
  }
}

// out[r, c] = bias + sum_{dy, dx} weights[dy, dx] * in[r + dy, c + dx] for a rows x cols region; `in` is its plane.
template <class T>
static void depthwise(const T* in, int64_t ld_in, int64_t rows, int64_t cols, const T* weights, int64_t size, T bias,
                      T* out, int64_t ld_out) {
  if (size == 5) {
    depthwise_sized<T, 5>(in, ld_in, rows, cols, weights, size, bias, out, ld_out);
  } else if (size == 3) {
    depthwise_sized<T, 3>(in, ld_in, rows, cols, weights, size, bias, out, ld_out);
  } else {
    depthwise_sized<T, 0>(in, ld_in, rows, cols, weights, size, bias, out, ld_out);
  }
}

// --- the gradient of its weights ------------------------------------------------------------------------------------

// R rows of V vectors, one column of taps: acc[dy][j] += sum_r grad[r, j] * in[r + dy, j].
template <class T, int kSize, int R, int V>
static inline void depthwise_weight_grad_block(const T* grad, int64_t ld_grad, const T* in, int64_t ld_in, int64_t last,
                                               Vec<T> (&acc)[kSize][2]) {
  constexpr int L = kLanes<T>;
  // Both sides end with the row: 0 * NaN from the next row would be NaN.
  auto part = [&](const T* p, int j) {
    return j + 1 < V || last == L ? load(p + j * L) : load_compute(p + j * L, last);
  };
  Vec<T> g[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) g[r][j] = part(grad + r * ld_grad, j);
  }
#pragma GCC unroll 16
  for (int y = 0; y < R + kSize - 1; ++y) {
#pragma GCC unroll 2
    for (int j = 0; j < V; ++j) {
      Vec<T> x = part(in + y * ld_in, j);
      keep_in_register(x);
#pragma GCC unroll 8
      for (int dy = y < R ? 0 : y - R + 1; dy <= (y < kSize ? y : kSize - 1); ++dy) acc[dy][j] += g[y - dy][j] * x;
    }
  }
}

template <class T, int kSize, int V, int R>
static inline void depthwise_weight_grad_rows(int64_t rows, const T* grad, int64_t ld_grad, const T* in, int64_t ld_in,
                                              int64_t last, Vec<T> (&acc)[kSize][2]) {
  if constexpr (R > 0) {
    if (rows == R) {
      depthwise_weight_grad_block<T, kSize, R, V>(grad, ld_grad, in, ld_in, last, acc);
    } else {
      depthwise_weight_grad_rows<T, kSize, V, R - 1>(rows, grad, ld_grad, in, ld_in, last, acc);
    }
  }
}

template <class T, int kSize, int V>
static inline void depthwise_weight_grad_columns(int64_t rows, const T* grad, int64_t ld_grad, const T* in,
                                                 int64_t ld_in, int64_t last, Vec<T> (&acc)[kSize][2]) {
  constexpr int kRows = 4;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows, grad += kRows * ld_grad, in += kRows * ld_in) {
    depthwise_weight_grad_block<T, kSize, kRows, V>(grad, ld_grad, in, ld_in, last, acc);
  }
  depthwise_weight_grad_rows<T, kSize, V, kRows - 1>(rows - r, grad, ld_grad, in, ld_in, last, acc);
}

// sums[dy * size] += for the column of taps that `in` begins at; kSize of its rows are done at once.
template <class T, int kSize>
static void depthwise_weight_grad_column(const T* grad, int64_t ld_grad, const T* in, int64_t ld_in, int64_t rows,
                                         int64_t cols, int64_t size, Vec<T>* sums) {
  constexpr int L = kLanes<T>, V = kVecRegisters == 32 ? 2 : 1;
  Vec<T> acc[kSize][2] = {};
  int64_t c = 0;
  auto last = [&](int64_t vectors) { return cols - c >= vectors * L ? L : cols - c - (vectors - 1) * L; };
  if (V == 2) {
    for (; c + L < cols; c += 2 * L) {
      depthwise_weight_grad_columns<T, kSize, 2>(rows, grad + c, ld_grad, in + c, ld_in, last(2), acc);
    }
  }
  for (; c < cols; c += L) {
    depthwise_weight_grad_columns<T, kSize, 1>(rows, grad + c, ld_grad, in + c, ld_in, last(1), acc);
  }
  for (int dy = 0; dy < kSize; ++dy) sums[dy * size] += acc[dy][0] + acc[dy][1];
}

// sums[dy * size + dx] += sum_{r, c} grad[r, c] * in[r + dy, c + dx] over a region whose plane is `in`.
template <class T>
static void depthwise_weight_grad(const T* grad, int64_t ld_grad, const T* in, int64_t ld_in, int64_t rows,
                                  int64_t cols, int64_t size, Vec<T>* sums) {
  for (int64_t dx = 0; dx < size; ++dx) {
    if (size == 5) {
      depthwise_weight_grad_column<T, 5>(grad, ld_grad, in + dx, ld_in, rows, cols, size, sums + dx);
    } else if (size == 3) {
      depthwise_weight_grad_column<T, 3>(grad, ld_grad, in + dx, ld_in, rows, cols, size, sums + dx);
    } else {
      for (int64_t dy = 0; dy < size; ++dy) {
        depthwise_weight_grad_column<T, 1>(grad, ld_grad, in + dy * ld_in + dx, ld_in, rows, cols, size,
                                           sums + dy * size + dx);
      }
    }
  }
}

template <class T>
static T sum_of_lanes(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

}  // namespace efficientvit_kernels::cpu::EVK_ISA
