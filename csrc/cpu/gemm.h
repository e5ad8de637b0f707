// Matrix products C[m, n] = sum_k A[m, k] B[k, n] on packed operands, for one instruction set.
//
// A is packed once per call into panels of kPanelRows rows, B block by block into panels of kPanelCols columns; both
// panels run along k. Packing takes any strides and storage type, so the product itself is always float32 (or float64)
// on contiguous memory. A panel of results goes through a small buffer to a writer, which applies the epilogue.
#pragma once

#include "pointwise.h"
#include "tile.h"

namespace efficientvit_kernels::cpu::EVK_ISA {

inline constexpr int kPanelVectors = 2;
inline constexpr int kPanelRows = kMaxRows<kPanelVectors>;
inline constexpr int kPanelLd = (kPanelRows + 7) / 8 * 8;  // between the columns of a panel of A
template <class T>
inline constexpr int kPanelCols = kPanelVectors * kLanes<T>;

// Rows are dealt out evenly: a last panel of one row would wait for the latency of its additions.
static inline int64_t row_panels(int64_t m) { return (m + kPanelRows - 1) / kPanelRows; }
static inline int64_t first_row(int64_t m, int64_t panel) { return m * panel / row_panels(m); }
template <class T>
static inline int64_t col_panels(int64_t n) {
  return (n + kPanelCols<T> - 1) / kPanelCols<T>;
}

// Panels have room for the whole blocks that transpose() writes.
static inline int64_t panel_depth(int64_t depth) { return (depth + 3) / 4 * 4; }

inline constexpr int64_t kPackDepth = 64;
inline constexpr int64_t kPackLd = kPackDepth + 16;

// --- packing --------------------------------------------------------------------------------------------------------

// out[k * ld + i] = row_of(i)[k] for i < kLanes, k < depth: the transpose of rows that are contiguous.
template <class T, class RowOf>
static inline void pack_lanes(RowOf row_of, int64_t depth, T* out, int64_t ld) {
  constexpr int L = kLanes<T>;
  decltype(row_of(int64_t{})) row[L];
  for (int64_t r = 0; r < L; ++r) row[r] = row_of(r);
  for (int64_t k = 0; k < depth; k += L) {
    const int64_t count = depth - k < L ? depth - k : L;
    Vec<T> square[L];
    for (int64_t r = 0; r < L; ++r) {
      square[r] = count == L ? load_compute(row[r] + k) : load_compute(row[r] + k, count);
    }
    transpose_square<T>(square);
    for (int64_t c = 0; c < count; ++c) store(out + (k + c) * ld, square[c]);
  }
}

// Panels [p0, p1) of A, whose element (i, k) is a[i * stride_m + k * stride_k], times factors[k] where there are any;
// `packed` is where panel p0 goes. Entries past a panel's last row only reach rows that nobody writes.
template <class S, class T>
static void pack_rows(const S* a, int64_t stride_m, int64_t stride_k, int64_t m, int64_t depth, int64_t p0, int64_t p1,
                      const T* factors, T* packed) {
  const int64_t panel_numel = panel_depth(depth) * kPanelLd;
  if (stride_k == 1) {
    for (int64_t p = p0; p < p1; ++p) {
      for (int64_t i = 0; i < kPanelLd; i += kLanes<T>) {
        const int64_t i0 = first_row(m, p) + i;
        auto row = [&](int64_t r) { return a + (i0 + r < m ? i0 + r : m - 1) * stride_m; };  // at the end, the last row
        pack_lanes<T>(row, depth, packed + (p - p0) * panel_numel + i, kPanelLd);
      }
    }
  } else {
    constexpr int64_t kTogether = 8;  // panels: a column of one panel alone is less than a cache line
    for (int64_t p = p0; p < p1; p += kTogether) {
      const int64_t end = p + kTogether < p1 ? p + kTogether : p1;
      for (int64_t k = 0; k < depth; ++k) {
        for (int64_t q = p; q < end; ++q) {
          const int64_t i0 = first_row(m, q), rows = first_row(m, q + 1) - i0;
          const S* column = a + i0 * stride_m + k * stride_k;
          T* out = packed + (q - p0) * panel_numel + k * kPanelLd;
          if (stride_m == 1) {
            __builtin_prefetch(column + 16 * stride_k);  // each k is on a page of its own
            convert_in<Load::kPlain>(column, m - i0 < kPanelLd ? rows : kPanelLd, out);
          } else {
            for (int64_t i = 0; i < rows; ++i) out[i] = to_compute(column[i * stride_m]);
          }
        }
      }
    }
  }
  if (factors == nullptr) return;
  for (int64_t p = p0; p < p1; ++p, packed += panel_numel) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < kPanelLd; ++i) packed[k * kPanelLd + i] *= factors[k];
    }
  }
}

static inline int64_t packed_rows_numel(int64_t m, int64_t depth) {
  return row_panels(m) * panel_depth(depth) * kPanelLd;
}
template <class T>
static inline int64_t packed_cols_numel(int64_t n, int64_t depth) {
  return col_panels<T>(n) * panel_depth(depth) * kPanelCols<T>;
}

// One row of B, contiguous, into row k of its panels.
template <class T, class Source>
static inline void scatter_row(int64_t k, int64_t count, int64_t depth, T* packed, Source source) {
  constexpr int L = kLanes<T>, NR = kPanelCols<T>;
  for (int64_t n = 0; n < count; n += L) {
    store(packed + (n / NR * panel_depth(depth) + k) * NR + n % NR, source(n));
  }
}

// Columns [n0, n0 + count) of B into panels of `depth` rows: B's rows are the channels of an image, its columns the
// tokens. scratch: pack_cols_scratch values.
template <class S, class T>
static void pack_cols(const Tokens<const S>& tokens, int64_t depth, int64_t n0, int64_t count, T* packed, T* scratch) {
  constexpr int L = kLanes<T>, NR = kPanelCols<T>;
  if (tokens.stride_w == 1 && n0 + count <= tokens.width) {
    const S* row = tokens.data + n0;
    for (int64_t k = 0; k < depth; ++k, row += tokens.stride_c) {
      scatter_row<T>(k, count, depth, packed, [&](int64_t n) {
        return n + L <= count ? load_compute(row + n) : load_compute(row + n, count - n);
      });
    }
    return;
  }
  if (tokens.stride_c == 1) {
    for (int64_t n = 0; n < count; n += L) {
      // Past the last token, that token again.
      auto token = [&](int64_t i) { return tokens.at(n0 + (n + i < count ? n + i : count - 1)); };
      pack_lanes<T>(token, depth, packed + n / NR * panel_depth(depth) * NR + n % NR, NR);
    }
    return;
  }
  for (int64_t n = 0; n < count; n += NR) {
    const int64_t width = count - n < NR ? count - n : NR;
    T* panel = packed + n * panel_depth(depth);
    for (int64_t k = 0; k < depth; k += kPackDepth) {
      const int64_t channels = depth - k < kPackDepth ? depth - k : kPackDepth;
      const Tokens<const S> part{tokens.data + k * tokens.stride_c, tokens.stride_c, tokens.stride_h, tokens.stride_w,
                                 tokens.width};
      load_row_tile<Load::kPlain>(part, channels, n0 + n, width, scratch, kPackLd);
      transpose(scratch, kPackLd, NR, channels, panel + k * NR, NR);
    }
  }
}

template <class T>
static inline int64_t pack_cols_scratch() {
  return kPanelCols<T> * kPackLd;
}

// --- the product ----------------------------------------------------------------------------------------------------

// rows x cols results of one panel of A and one of B, to c, whose rows are ldc apart: whole vectors of columns.
template <class T, bool kAccumulate>
static inline void multiply_panels(int64_t rows, int64_t cols, int64_t depth, const T* a, const T* b, T* c,
                                   int64_t ldc) {
  constexpr int NR = kPanelCols<T>;
  if (cols > kLanes<T>) {
    dispatch_rows<T, 1, kAccumulate, kPanelVectors, kPanelRows>(rows, depth, a, kPanelLd, b, NR, c, ldc);
  } else {
    dispatch_rows<T, 1, kAccumulate, 1, kPanelRows>(rows, depth, a, kPanelLd, b, NR, c, ldc);
  }
}

// Row i of up to 14 that are `stride` bytes apart, from every third one: base plus 1, 2, 4 or 8 strides is one operand,
// so five pointers serve all rows, where one for each would not fit into the registers.
struct ThirdRows {
  const char *row0, *row3, *row6, *row9, *row12;

  ThirdRows(const void* first, int64_t stride)
      : row0(static_cast<const char*>(first)),
        row3(row0 + 3 * stride),
        row6(row3 + 3 * stride),
        row9(row6 + 3 * stride),
        row12(row9 + 3 * stride) {}

  const char* at(int i, int64_t stride) const {
    switch (i) {
      case 0:
        return row0;
      case 1:
        return row0 + stride;
      case 2:
        return row0 + 2 * stride;
      case 4:
        return row0 + 4 * stride;
      case 8:
        return row0 + 8 * stride;
      case 3:
        return row3;
      case 5:
        return row3 + 2 * stride;
      case 7:
        return row3 + 4 * stride;
      case 11:
        return row3 + 8 * stride;
      case 6:
        return row6;
      case 10:
        return row6 + 4 * stride;
      case 9:
        return row9;
      case 13:
        return row9 + 4 * stride;
      default:
        return row12;
    }
  }

  void advance(int64_t bytes) {
    row0 += bytes, row3 += bytes, row6 += bytes, row9 += bytes, row12 += bytes;
    // Opaque, or the compiler works out all the rows' pointers after all.
    asm volatile("" : "+r"(row0), "+r"(row3), "+r"(row6), "+r"(row9), "+r"(row12));
  }
};

// As micro_product, with the rows of A as they lie in memory, contiguous along k, `stride` elements apart.
template <class T, bool kAccumulate, int MR, int NV>
static void micro_product_by_rows(int64_t depth, const T* a, int64_t stride, const T* b, T* c, int64_t ldc) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV] = {};
  ThirdRows rows(a, stride * sizeof(T));
  for (int64_t k = 0; k < depth; ++k, b += kPanelCols<T>) {
    Vec<T> row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load(b + j * L);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      T value;
      __builtin_memcpy(&value, rows.at(i, stride * static_cast<int64_t>(sizeof(T))), sizeof(T));
      const Vec<T> ai = broadcast(value);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += ai * row[j];
    }
    rows.advance(sizeof(T));
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(c + j * L, kAccumulate ? load(c + j * L) + acc[i][j] : acc[i][j]);
    c += ldc;
    asm volatile("" : "+r"(c));  // one running pointer, as in micro_product
  }
}

template <class T, bool kAccumulate, int NV, int MR = kPanelRows>
static inline void multiply_rows(int64_t rows, int64_t depth, const T* a, int64_t stride, const T* b, T* c,
                                 int64_t ldc) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      micro_product_by_rows<T, kAccumulate, MR, NV>(depth, a, stride, b, c, ldc);
    } else {
      multiply_rows<T, kAccumulate, NV, MR - 1>(rows, depth, a, stride, b, c, ldc);
    }
  }
}

// Terms that are summed in one chain of additions; the error of the sum grows with its length.
inline constexpr int64_t kChain = 128;

// c = or += the terms [k, k + depth) of one panel of A and one of B.
template <class T, bool kAccumulate>
static inline void multiply_chain(const WeightRows& weight, const T* a, int64_t k, int64_t depth, int64_t rows,
                                  int64_t cols, const T* b, T* c, int64_t ldc) {
  b += k * kPanelCols<T>;
  if (weight.stride == 0) {
    multiply_panels<T, kAccumulate>(rows, cols, depth, a + k * kPanelLd, b, c, ldc);
  } else if (cols > kLanes<T>) {
    multiply_rows<T, kAccumulate, kPanelVectors>(rows, depth, a + k, weight.stride, b, c, ldc);
  } else {
    multiply_rows<T, kAccumulate, 1>(rows, depth, a + k, weight.stride, b, c, ldc);
  }
}

// The product of the row panels [p0, p1), which begin at rows.data, and `count` columns. A writer gets every block of
// results: in place where writer.target(row, column, columns) names memory, whose rows are writer.target_ld() apart,
// else as [rows, kPanelCols] values through writer(row, rows, column, columns, block).
template <class T, class Writer>
static void multiply(const WeightRows& weight, int64_t m, int64_t p0, int64_t p1, int64_t depth, const T* packed_cols,
                     int64_t count, const Writer& writer) {
  constexpr int NR = kPanelCols<T>;
  alignas(kVecBytes) T block[kPanelRows * NR];
  for (int64_t p = p0; p < p1; ++p) {
    const int64_t i0 = first_row(m, p), rows = first_row(m, p + 1) - i0;
    const T* a = static_cast<const T*>(weight.data);
    a += weight.stride ? (i0 - first_row(m, p0)) * weight.stride : (p - p0) * panel_depth(depth) * kPanelLd;
    for (int64_t n = 0; n < count; n += NR) {
      const int64_t cols = count - n < NR ? count - n : NR;
      const T* b = packed_cols + n * panel_depth(depth);
      T* target = writer.target(i0, n, cols);
      T* c = target ? target : block;
      const int64_t ldc = target ? writer.target_ld() : NR;
      const int64_t chains = at_least(1, (depth + kChain / 2) / kChain);
      multiply_chain<T, false>(weight, a, 0, depth / chains, rows, cols, b, c, ldc);
      for (int64_t i = 1; i < chains; ++i) {
        const int64_t k = depth * i / chains, end = depth * (i + 1) / chains;
        multiply_chain<T, true>(weight, a, k, end - k, rows, cols, b, c, ldc);
      }
      if (!target) writer(i0, rows, n, cols, block);
    }
  }
}

// --- results to an image --------------------------------------------------------------------------------------------

// y[m] = value * scale[m] + shift[m] + residual: each where it is given. Compute type but for the residual.
template <class S>
struct Epilogue {
  const Compute<S>*scale, *shift;
  Tokens<const S> residual;  // data is null where there is none

  Compute<S> scale_of(int64_t m) const { return scale ? scale[m] : Compute<S>(1); }
  Compute<S> shift_of(int64_t m) const { return shift ? shift[m] : Compute<S>(0); }
};

// `count` results of one channel, to contiguous memory.
template <class S, class T>
static inline void finish_channel(const T* values, int64_t count, T scale, T shift, const S* residual, S* out) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < count; i += L) {
    const int64_t left = count - i;
    Vec<T> v = load(values + i) * broadcast(scale) + broadcast(shift);
    if (residual) v += left >= L ? load_compute(residual + i) : load_compute(residual + i, left);
    if (left >= L) {
      store_compute(out + i, v);
    } else {
      store_compute(out + i, v, left);
    }
  }
}

// `channels` results of one token, to contiguous memory.
template <class S, class T>
static inline void finish_token(const T* values, int64_t channels, const T* scale, const T* shift, const S* residual,
                                S* out) {
  constexpr int L = kLanes<T>;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t left = channels - c;
    auto part = [&](const auto* p) { return left >= L ? load_compute(p + c) : load_compute(p + c, left); };
    const Vec<T> factor = scale ? part(scale) : broadcast(T(1)), term = shift ? part(shift) : Vec<T>{};
    // One expression, as in finish_channel: both become a fused multiply-add, or neither.
    Vec<T> v = load(values + c) * factor + term;
    if (residual) v += part(residual);
    if (left >= L) {
      store_compute(out + c, v);
    } else {
      store_compute(out + c, v, left);
    }
  }
}

// Writes the product's blocks for the tokens of one region into an NCHW or channels_last image, rows [m0, m1).
// NCHW: at once, if the region is one run of tokens; otherwise by way of `tile`, [m1 - m0 rounded up, tile_ld].
template <class S>
struct ImageWriter {
  using T = Compute<S>;

  static int64_t tile_ld(int64_t tokens) { return (tokens + kPanelCols<T> + 15) / 16 * 16; }
  static int64_t scratch_numel(int64_t rows, int64_t tokens) {
    return (rows + 16) * tile_ld(tokens) + (kLanes<T> + 4) * (rows + 32);
  }

  // scratch: scratch_numel(m1 - m0, tokens of the region) values.
  ImageWriter(const Tokens<S>& out, const Epilogue<S>& epilogue, const Region& region, int64_t width, int64_t m0,
              int64_t m1, T* scratch)
      : out(out), epilogue(epilogue), region(region), width(width), m0(m0), m1(m1), tile(scratch) {
    direct = out.stride_w == 1 && (region.cols() == width || region.rows() == 1);
    ld = tile_ld(region.tokens());
    rows_tile = tile + (m1 - m0 + 16) * ld;
  }

  // Whole blocks without an epilogue need no rounding and no second look.
  T* target(int64_t i0, int64_t n, int64_t cols) const {
    if constexpr (sizeof(S) == sizeof(T)) {
      const bool plain = !epilogue.scale && !epilogue.shift && !epilogue.residual.data;
      if (direct && plain && cols == kPanelCols<T>) {
        return out.data + i0 * out.stride_c + region.r0 * width + region.c0 + n;
      }
    }
    return nullptr;
  }
  int64_t target_ld() const { return out.stride_c; }

  void operator()(int64_t i0, int64_t rows, int64_t n, int64_t cols, const T* block) const {
    const int64_t first = region.r0 * width + region.c0 + n;
    for (int64_t i = 0; i < rows; ++i, block += kPanelCols<T>) {
      if (direct) {
        channel(i0 + i, first, cols, block);
      } else {
        for (int64_t c = 0; c < cols; c += kLanes<T>) store(tile + (i0 + i - m0) * ld + n + c, load(block + c));
      }
    }
  }

  void channel(int64_t m, int64_t n, int64_t count, const T* values) const {
    const S* residual = epilogue.residual.data;
    if (residual) residual += m * epilogue.residual.stride_c + n;
    finish_channel<S>(values, count, epilogue.scale_of(m), epilogue.shift_of(m), residual,
                      out.data + m * out.stride_c + n);
  }

  // After the last block.
  void finish() const {
    if (direct) return;
    for_each_region_run(region, width, [&](int64_t n0, int64_t offset, int64_t length) {
      if (out.stride_w == 1) {
        for (int64_t m = m0; m < m1; ++m) channel(m, n0, length, tile + (m - m0) * ld + offset);
      } else {
        tokens_by_rows(n0, offset, length);
      }
    });
  }

  void tokens_by_rows(int64_t n0, int64_t offset, int64_t length) const {
    constexpr int64_t kStep = kLanes<T>;
    const int64_t channels = m1 - m0, ld_row = (channels + 31) / 16 * 16;
    for (int64_t i = 0; i < length; i += kStep) {
      const int64_t count = length - i < kStep ? length - i : kStep;
      transpose(tile + offset + i, ld, channels, count, rows_tile, ld_row);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t n = n0 + i + t;
        const S* residual = epilogue.residual.data;
        if (residual) residual += n * epilogue.residual.stride_w + m0;
        finish_token<S>(rows_tile + t * ld_row, channels, epilogue.scale ? epilogue.scale + m0 : nullptr,
                        epilogue.shift ? epilogue.shift + m0 : nullptr, residual, out.data + n * out.stride_w + m0);
      }
    }
  }

  Tokens<S> out;
  Epilogue<S> epilogue;
  Region region;
  int64_t width, m0, m1, ld;
  T *tile, *rows_tile;
  bool direct;
};

}  // namespace efficientvit_kernels::cpu::EVK_ISA
