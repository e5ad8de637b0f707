// Tiles of tokens and the small matrix product on them, for one instruction set.
//
// A tile in "column form" is [channels, kTileLd]: one row per channel, tokens contiguous. A tile in "row form" is
// [tokens, ld]: one row per token. Whatever the strides and the dtype in memory, kernels compute on column tiles of the
// compute type, so every layout gives the same bits. Entries past the last token or channel are padding: they are read,
// but only ever reach other padding.
#pragma once

#include "image.h"
#include "plan.h"
#include "vec.h"

namespace efficientvit_kernels::cpu::EVK_ISA {

// Row stride of a column tile. A constant, so that the addresses of a product's rows are immediate offsets; not a power
// of two, so that the rows do not fall into the same cache set.
inline constexpr int kTileLd = static_cast<int>(kTileTokens) + 16;

// Hands out pieces of one block of scratch memory, each on a boundary of 16 values. Over no memory it only counts.
template <class T>
struct Arena {
  explicit Arena(void* memory) : memory(static_cast<T*>(memory)) {}
  T* take(int64_t count) {
    T* piece = memory ? memory + used : nullptr;
    used += (count + 15) / 16 * 16;
    return piece;
  }
  T* memory;
  int64_t used = 0;
};

// Where tokens of one image lie in memory, from some channel on. Strides in elements.
template <class S>
struct Tokens {
  S* data;
  int64_t stride_c;  // channel to channel
  int64_t stride_h;  // image row to image row
  int64_t stride_w;  // pixel to pixel
  int64_t width;     // pixels per image row; all tokens when rows follow each other without a gap

  S* at(int64_t n) const {
    return n < width ? data + n * stride_w : data + n / width * stride_h + n % width * stride_w;
  }
};

// The tokens of image b from `first_channel` on.
template <class S>
static Tokens<S> tokens_of(const ImageTensor& t, int64_t height, int64_t width, int64_t b, int64_t first_channel) {
  const bool gapless = t.stride_h == width * t.stride_w;
  return {static_cast<S*>(t.data) + b * t.stride_b + first_channel * t.stride_c, t.stride_c, t.stride_h, t.stride_w,
          gapless ? height * width : width};
}

// --- C[m, cols] = or += A[m, k] B[k, cols] --------------------------------------------------------------------------

// A's element (i, k) is a[i * kStrideM + k * stride_k]. MR x NV accumulators stay in registers over all of K.
template <class T, int kStrideM, bool kAccumulate, int MR, int NV>
static void micro_product(int64_t depth, const T* a, int64_t stride_k, const T* b, int64_t ldb, T* c, int64_t ldc) {
  constexpr int L = kLanes<T>;
  Vec<T> acc[MR][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = load(b + j * L);
#pragma GCC unroll 32
    for (int i = 0; i < MR; ++i) {
      const Vec<T> ai = broadcast(a[i * kStrideM]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] += ai * row[j];
    }
    a += stride_k;
    b += ldb;
  }
#pragma GCC unroll 32
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(c + j * L, kAccumulate ? load(c + j * L) + acc[i][j] : acc[i][j]);
    c += ldc;
    // Keeps c one running pointer: the compiler would otherwise work out MR addresses up front and run out of
    // registers.
    asm volatile("" : "+r"(c));
  }
}

// Rows that a block of NV vectors takes: all but four or so of the registers hold accumulators.
template <int NV>
inline constexpr int kMaxRows = (kVecRegisters - 4) / NV;

template <class T, int kStrideM, bool kAccumulate, int NV, int MR = kMaxRows<NV>>
static inline void dispatch_rows(int64_t rows, int64_t depth, const T* a, int64_t stride_k, const T* b, int64_t ldb,
                                 T* c, int64_t ldc) {
  if constexpr (MR > 0) {
    if (rows == MR) {
      micro_product<T, kStrideM, kAccumulate, MR, NV>(depth, a, stride_k, b, ldb, c, ldc);
    } else {
      dispatch_rows<T, kStrideM, kAccumulate, NV, MR - 1>(rows, depth, a, stride_k, b, ldb, c, ldc);
    }
  }
}

// Rows are cut into blocks of nearly equal height: a last block of one row would wait for the latency of its additions.
template <class T, int kStrideM, bool kAccumulate, int NV>
static void product_columns(int64_t m, int64_t depth, const T* a, int64_t stride_k, const T* b, int64_t ldb, T* c,
                            int64_t ldc) {
  const int64_t blocks = (m + kMaxRows<NV> - 1) / kMaxRows<NV>;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t i0 = m * block / blocks, i1 = m * (block + 1) / blocks;
    dispatch_rows<T, kStrideM, kAccumulate, NV>(i1 - i0, depth, a + i0 * kStrideM, stride_k, b, ldb, c + i0 * ldc, ldc);
  }
}

// cols counts elements; it is rounded up to whole vectors, so B and C need that much padding.
template <class T, int kStrideM, bool kAccumulate>
static void product(int64_t m, int64_t depth, int64_t cols, const T* a, int64_t stride_k, const T* b, int64_t ldb, T* c,
                    int64_t ldc) {
  constexpr int L = kLanes<T>;
  constexpr int kWide = kVecRegisters == 32 ? 4 : 2;
  const int64_t vectors = (cols + L - 1) / L;
  int64_t v = 0;
  for (; v + kWide <= vectors; v += kWide) {
    product_columns<T, kStrideM, kAccumulate, kWide>(m, depth, a, stride_k, b + v * L, ldb, c + v * L, ldc);
  }
  if (kWide == 4 && v + 2 <= vectors) {
    product_columns<T, kStrideM, kAccumulate, 2>(m, depth, a, stride_k, b + v * L, ldb, c + v * L, ldc);
    v += 2;
  }
  if (v < vectors) {
    product_columns<T, kStrideM, kAccumulate, 1>(m, depth, a, stride_k, b + v * L, ldb, c + v * L, ldc);
  }
}

template <class T>
static void add_to_row(T* row, int64_t cols, T x) {
  for (int64_t c = 0; c < cols; c += kLanes<T>) store(row + c, load(row + c) + broadcast(x));
}

// --- moving tiles ---------------------------------------------------------------------------------------------------

// dst[c][r] = src[r][c], in blocks of kLanes rows by 4 columns: src and dst need that much padding.
template <class T>
static void transpose(const T* src, int64_t ld, int64_t rows, int64_t cols, T* dst, int64_t ld_dst) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L) {
    int64_t c = 0;
    // With two lanes, squares would leave a rest that does not begin at a block of 4, which dst has room for.
    for (; L >= 4 && c + L <= cols; c += L) {
      Vec<T> square[L];
      for (int64_t i = 0; i < L; ++i) square[i] = load(src + (r + i) * ld + c);
      transpose_square<T>(square);
      for (int64_t i = 0; i < L; ++i) store(dst + (c + i) * ld_dst + r, square[i]);
    }
    for (; c < cols; c += 4) transpose_lanes_by_4(src + r * ld + c, ld, dst + c * ld_dst + r, ld_dst);
  }
}

// What happens to a value on its way into a tile.
enum class Load { kPlain, kRelu };

template <Load kLoad, class X>
static inline X loaded(X x) {
  if constexpr (kLoad == Load::kRelu) return relu(x);
  return x;
}

// Whole vectors: dst is filled with zeros up to the next multiple of kLanes.
template <Load kLoad, class S, class T>
static inline void convert_in(const S* src, int64_t count, T* dst) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(dst + i, loaded<kLoad>(load_compute(src + i)));
  if (i < count) store(dst + i, loaded<kLoad>(load_compute(src + i, count - i)));
}

// With kFactors, value i is multiplied by factors[i].
template <bool kFactors, class S, class T>
static inline void convert_out(const T* src, const T* factors, int64_t count, S* dst) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    store_compute(dst + i, kFactors ? load(src + i) * load(factors + i) : load(src + i));
  }
  if (i < count) store_compute(dst + i, kFactors ? load(src + i) * load(factors + i) : load(src + i), count - i);
}

// Calls body(first token of the run, offset in the tile, length) for every run of tokens within one image row.
template <class S, class Body>
static inline void for_each_run(const Tokens<S>& tokens, int64_t n0, int64_t count, Body body) {
  for (int64_t done = 0; done < count;) {
    const int64_t column = n0 + done < tokens.width ? n0 + done : (n0 + done) % tokens.width;
    const int64_t left_in_row = tokens.width - column;
    const int64_t length = left_in_row < count - done ? left_in_row : count - done;
    body(tokens.at(n0 + done), done, length);
    done += length;
  }
}

// Rows of a tile are too many, and too short, for the hardware's prefetcher: each asks for its part in the next tile.
// An address past the end of the tensor does no harm.
template <int kForWriting, class S>
static inline void prefetch_next(const S* row, int64_t length) {
  for (int64_t i = 0; i < length; i += 64 / static_cast<int64_t>(sizeof(S))) {
    __builtin_prefetch(row + length + i, kForWriting);
  }
}

// Tokens [n0, n0 + count) in row form: out[token][channel].
template <Load kLoad, class S, class T>
static void load_row_tile(const Tokens<const S>& tokens, int64_t channels, int64_t n0, int64_t count, T* out,
                          int64_t ld) {
  for_each_run(tokens, n0, count, [&](const S* run, int64_t offset, int64_t length) {
    for (int64_t i = 0; i < length; ++i) {
      const S* token = run + i * tokens.stride_w;
      T* row = out + (offset + i) * ld;
      if (tokens.stride_c == 1) {
        convert_in<kLoad>(token, channels, row);
      } else {
        for (int64_t c = 0; c < channels; ++c) row[c] = loaded<kLoad>(to_compute(token[c * tokens.stride_c]));
      }
    }
  });
}

// Tokens [n0, n0 + count) in column form: out[channel][token]. scratch holds a row tile.
template <Load kLoad, class S, class T>
static void load_column_tile(const Tokens<const S>& tokens, int64_t channels, int64_t n0, int64_t count, T* out,
                             int64_t ld, T* scratch, int64_t ld_scratch) {
  if (tokens.stride_w != 1 && tokens.stride_c == 1) {
    load_row_tile<kLoad>(tokens, channels, n0, count, scratch, ld_scratch);
    transpose(scratch, ld_scratch, count, channels, out, ld);
    return;
  }
  for_each_run(tokens, n0, count, [&](const S* run, int64_t offset, int64_t length) {
    const S* row = run;
    T* dst = out + offset;
    if (tokens.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c, row += tokens.stride_c, dst += ld) {
        prefetch_next<0>(row, length);
        convert_in<kLoad>(row, length, dst);
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c, row += tokens.stride_c, dst += ld) {
      for (int64_t i = 0; i < length; ++i) dst[i] = loaded<kLoad>(to_compute(row[i * tokens.stride_w]));
    }
  });
}

// The opposite way: a column tile to memory, rounded once to the storage type. With kFactors, token i is multiplied by
// factors[i] first.
template <bool kFactors, class S, class T>
static void store_columns(const T* tile, int64_t ld, const T* factors, const Tokens<S>& tokens, int64_t channels,
                          int64_t n0, int64_t count, T* scratch, int64_t ld_scratch) {
  const bool by_rows = tokens.stride_w != 1 && tokens.stride_c == 1;
  if (by_rows) transpose(tile, ld, channels, count, scratch, ld_scratch);
  for_each_run(tokens, n0, count, [&](S* run, int64_t offset, int64_t length) {
    if (by_rows) {
      T* row = scratch + offset * ld_scratch;
      for (int64_t i = 0; i < length; ++i, row += ld_scratch) {
        if constexpr (kFactors) {
          const Vec<T> factor = broadcast(factors[offset + i]);
          for (int64_t c = 0; c < channels; c += kLanes<T>) store(row + c, load(row + c) * factor);
        }
        convert_out<false>(row, factors, channels, run + i * tokens.stride_w);
      }
      return;
    }
    const T* row = tile + offset;
    S* dst = run;
    if (tokens.stride_w == 1) {
      for (int64_t c = 0; c < channels; ++c, row += ld, dst += tokens.stride_c) {
        prefetch_next<1>(dst, length);
        convert_out<kFactors>(row, factors + offset, length, dst);
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c, row += ld, dst += tokens.stride_c) {
      for (int64_t i = 0; i < length; ++i) {
        from_compute(kFactors ? row[i] * factors[offset + i] : row[i], dst + i * tokens.stride_w);
      }
    }
  });
}

// As store_columns; `factors` may be null.
template <class S, class T>
static void store_column_tile(const T* tile, int64_t ld, const T* factors, const Tokens<S>& tokens, int64_t channels,
                              int64_t n0, int64_t count, T* scratch, int64_t ld_scratch) {
  if (factors) {
    store_columns<true>(tile, ld, factors, tokens, channels, n0, count, scratch, ld_scratch);
  } else {
    store_columns<false>(tile, ld, tile, tokens, channels, n0, count, scratch, ld_scratch);
  }
}

// --- regions of an image --------------------------------------------------------------------------------------------

// A region's tokens follow each other row by row in a tile. Calls body(first token in the image, offset in the tile,
// length) for runs that are contiguous in the image's order: one, or one a row.
template <class Body>
static inline void for_each_region_run(const Region& region, int64_t width, Body body) {
  if (region.cols() == width) {
    body(region.r0 * width, int64_t{0}, region.tokens());
    return;
  }
  for (int64_t r = 0; r < region.rows(); ++r) {
    body((region.r0 + r) * width + region.c0, r * region.cols(), region.cols());
  }
}

// The scratch of these two holds a row tile of kTileTokens tokens.
template <Load kLoad, class S, class T>
static void load_region(const Tokens<const S>& tokens, int64_t channels, const Region& region, int64_t width, T* out,
                        int64_t ld, T* scratch, int64_t ld_scratch) {
  const bool by_rows = tokens.stride_w != 1 && tokens.stride_c == 1;
  for_each_region_run(region, width, [&](int64_t n0, int64_t offset, int64_t length) {
    const int64_t step = by_rows ? kTileTokens : length;
    for (int64_t i = 0; i < length; i += step) {
      const int64_t count = length - i < step ? length - i : step;
      load_column_tile<kLoad>(tokens, channels, n0 + i, count, out + offset + i, ld, scratch, ld_scratch);
    }
  });
}

template <class S, class T>
static void store_region(const T* tile, int64_t ld, const Tokens<S>& tokens, int64_t channels, const Region& region,
                         int64_t width, T* scratch, int64_t ld_scratch) {
  const bool by_rows = tokens.stride_w != 1 && tokens.stride_c == 1;
  for_each_region_run(region, width, [&](int64_t n0, int64_t offset, int64_t length) {
    const int64_t step = by_rows ? kTileTokens : length;
    for (int64_t i = 0; i < length; i += step) {
      const int64_t count = length - i < step ? length - i : step;
      store_column_tile<S, T>(tile + offset + i, ld, nullptr, tokens, channels, n0 + i, count, scratch, ld_scratch);
    }
  });
}

}  // namespace efficientvit_kernels::cpu::EVK_ISA
