// A product W X of 16-bit matrices in shared memory, its columns pixels of a tile: what a block needs of a 1 x 1
// convolution whose input or output never leaves it.
#pragma once

#include "image_tile.cuh"
#include "lite_mla_plan.h"

namespace efficientvit_kernels::cuda {

__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const __half*) {
  mma_m16n8k16_f16(d, a, b);
}
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const __nv_bfloat16*) {
  mma_m16n8k16_bf16(d, a, b);
}

// Rows of W in shared memory, `pitch` apart: an odd multiple of 16 bytes, so that 8 rows are in different banks.
template <class T>
struct RowsOfWeight {
  T* data;
  int rows, columns;  // columns: a multiple of 16

  __device__ int pitch() const { return weight_pitch(columns); }

  // Row i is row from_row(i) of a dense matrix of as many columns, aligned to 16 bytes. Asynchronous; the caller
  // commits.
  template <class Row>
  __device__ void load_async(const T* from, Row from_row) const {
    const int vectors = columns / 8;
    for (int e = threadIdx.x; e < rows * vectors; e += blockDim.x) {
      const int row = e / vectors, column = e % vectors * 8;
      cp_async_16(data + row * pitch() + column, from + from_row(row) * columns + column, true);
    }
  }
};

// The part of an image that a tile and its halo show, of all channels of x: [channel][pixel], or, where x has its
// channels side by side, [pixel][channel].
template <class T>
struct InputTile {
  T* data;
  int channels;
  bool along_channels;
  int y0, x0, rows, cols;  // in the image

  // Rows begin and, but for the image's end, end at an even column, so that pairs of pixels can be copied.
  __device__ InputTile(T* data, int channels, bool along_channels, const Window& window, int tile_rows, int tile_cols,
                       int pad)
      : data(data), channels(channels), along_channels(along_channels) {
    y0 = max(window.y0 - pad, 0), rows = min(window.y0 + tile_rows + pad, window.height) - y0;
    x0 = max(window.x0 - pad, 0) & ~1, cols = min((window.x0 + tile_cols + pad + 1) & ~1, window.width) - x0;
  }
  __device__ int pixels() const { return rows * cols; }
  __device__ int pitch() const { return along_channels ? weight_pitch(channels) : input_pitch(pixels()); }

  // Asynchronous but for Access::kElements; the caller commits. kTokens: two pixels at a time.
  __device__ void load_async(const Channels<T>& from, Access access) const {
    if (along_channels) {
      for (Walk at(cols, channels / 8); at.plane < rows; at.next()) {
        cp_async_16(data + (at.plane * cols + at.row) * pitch() + at.column * 8,
                    from.at(at.column * 8, y0 + at.plane, x0 + at.row), true);
      }
    } else if (access == Access::kTokens) {
      for (Walk at(rows, cols / 2); at.plane < channels; at.next()) {
        cp_async_4(data + at.plane * pitch() + at.row * cols + at.column * 2,
                   from.at(at.plane, y0 + at.row, x0 + at.column * 2), true);
      }
    } else {
      Bits<T>* bits = reinterpret_cast<Bits<T>*>(data);
#pragma unroll 8
      for (Walk at(rows, cols); at.plane < channels; at.next()) {
        bits[at.plane * pitch() + at.row * cols + at.column] = *from.at(at.plane, y0 + at.row, x0 + at.column);
      }
    }
  }
  // Operand B: channels k to k + 15, pixels `pixel` to pixel + 15 in two columns of 8.
  __device__ void operand(uint32_t (&b)[4], int k, int pixel, int lane) const {
    if (along_channels) {
      ldmatrix_x4(b, data + (pixel + lane / 16 * 8 + lane % 8) * pitch() + k + lane / 8 % 2 * 8);
    } else {
      ldmatrix_x4_trans(b, data + (k + lane % 16) * pitch() + pixel + lane / 16 * 8);
    }
  }
};

// write(row, pixel, sum) for every row of W and every pixel, whose sums over W's columns come from x.operand. Warps
// take groups of 16 * kRowTiles rows by 16 pixels in turn; there must be memory for whole groups, whatever it holds.
template <int kRowTiles, class T, class Input, class Write>
__device__ void multiply_rows(const RowsOfWeight<T>& weight, const Input& x, int pixels, Write write) {
  constexpr int kRows = 16 * kRowTiles;
  const int lane = threadIdx.x % 32, groups = ceil_div_int(weight.rows, kRows);
  for (int i = threadIdx.x / 32; i < groups * ceil_div_int(pixels, 16); i += blockDim.x / 32) {
    const int row = i % groups * kRows, pixel = i / groups * 16;
    float acc[kRowTiles][2][4] = {};
    for (int k = 0; k < weight.columns; k += 16) {
      uint32_t b[4];
      x.operand(b, k, pixel, lane);
      const uint32_t columns[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        uint32_t a[4];
        ldmatrix_x4(a, weight.data + (row + 16 * tile + lane % 16) * weight.pitch() + k + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_m16n8k16(acc[tile][j], a, columns[j], weight.data);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int m = row + 16 * tile + e / 2 * 8 + lane / 4, p = pixel + 8 * j + lane % 4 * 2 + e % 2;
          if (m < weight.rows && p < pixels) write(m, p, acc[tile][j][e]);
        }
      }
    }
  }
}

}  // namespace efficientvit_kernels::cuda
