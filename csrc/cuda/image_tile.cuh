// Tiles of an image in shared memory, [channel][row][column], with the halo that a depthwise convolution reads: loads,
// stores, rows of pixels.
#pragma once

#include <type_traits>

#include "aggregate_plan.h"
#include "tile.cuh"

namespace efficientvit_kernels::cuda {

// Counts through a box [planes, rows, columns], last axis first, in steps of the block's threads: the divisions are
// done once, ahead of the loop.
struct Walk {
  int plane, row, column;

  __device__ Walk(int rows, int columns) : rows_(rows), columns_(columns) {
    split(threadIdx.x, plane, row, column);
    split(blockDim.x, planes_on_, rows_on_, columns_on_);
  }
  __device__ void next() {
    column += columns_on_, row += rows_on_, plane += planes_on_;
    if (column >= columns_) column -= columns_, row += 1;
    if (row >= rows_) row -= rows_, plane += 1;
  }

 private:
  __device__ void split(int e, int& plane, int& row, int& column) const {
    column = e % columns_, row = e / columns_ % rows_, plane = e / columns_ / rows_;
  }
  int rows_, columns_, planes_on_, rows_on_, columns_on_;
};

// Where channel c of D lies among the planes of a tile: those that lanes 4g .. 4g + 3 read at a time are neighbours.
template <int D>
__device__ int plane_of(int c) {
  return c % (D / 4) * 4 + c / (D / 4);
}
template <int D>
__device__ int channel_of(int plane) {
  return plane % 4 * (D / 4) + plane / 4;
}

// Stored values as bits: staging moves them, and computes nothing.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

// What a tile shows of one image: its pixels, and where they begin.
struct Window {
  int height, width, y0, x0;  // of the image; of the tile's first pixel
  __device__ bool has(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  __device__ bool shows(int row, int column) const { return has(y0 + row, x0 + column); }
};

// The channels of one image from `channel` on.
template <class T>
struct Channels {
  Bits<T>* data;
  int64_t stride_c, stride_h, stride_w;
  __device__ Channels(const Image& image, int64_t batch, int64_t channel)
      : data(static_cast<Bits<T>*>(image.data) + batch * image.stride_b + channel * image.stride_c),
        stride_c(image.stride_c),
        stride_h(image.stride_h),
        stride_w(image.stride_w) {}
  __device__ Bits<T>* at(int c, int y, int x) const { return data + c * stride_c + y * stride_h + x * stride_w; }
};

// A tile with `pad` pixels around it that are zero outside the image, as a convolution's padding is.
template <class T>
struct Halo {
  T* data;
  int rows, cols, pad, margin, plane;

  __device__ int pitch() const { return halo_pitch(cols, margin); }
  // Pixel (0, 0) is the first of the tile proper.
  __device__ T* at(int plane_index, int row, int column) const {
    return data + plane_index * plane + (row + pad) * pitch() + margin + column;
  }
};

// Channels 0 to C - 1, channel c into plane place(c). The access is that of all rows of all tensors of the launch.
template <int C, class T, class Place>
__device__ void load_halo(const Halo<T>& halo, const Channels<T>& from, const Window& window, Access access,
                          Place place) {
  constexpr int kVector = 16 / sizeof(T);
  const int rows = halo.rows + 2 * halo.pad, pad = halo.pad;
  if (access == Access::kTokens) {
    const int vectors = halo.pitch() / kVector;
    for (Walk at(rows, vectors); at.plane < C; at.next()) {
      const int row = at.row - pad, column = at.column * kVector - halo.margin;
      const bool there = window.shows(row, column);  // the whole vector, as rows end with one
      cp_async_16(halo.at(place(at.plane), row, column),
                  there ? from.at(at.plane, window.y0 + row, window.x0 + column) : from.data, there);
    }
    cp_async_commit();
    cp_async_wait<0>();
    return;
  }
  const int columns = halo.cols + 2 * pad;
  if (access == Access::kChannels) {
    constexpr int kVectors = C / kVector;
    for (Walk at(columns, kVectors); at.plane < rows; at.next()) {
      const int row = at.plane - pad, column = at.row - pad, c = at.column * kVector;
      uint32_t words[4] = {0, 0, 0, 0};
      if (window.shows(row, column)) load_words<4>(words, from.at(c, window.y0 + row, window.x0 + column));
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        Bits<T>* to = reinterpret_cast<Bits<T>*>(halo.at(place(c + i), row, column));
        *to = static_cast<Bits<T>>(sizeof(T) == 4 ? words[i] : words[i / 2] >> (i % 2 * 16));
      }
    }
    return;
  }
  const bool along_channels = from.stride_c == 1;
  for (Walk at(along_channels ? columns : rows, along_channels ? C : columns); at.plane < (along_channels ? rows : C);
       at.next()) {
    const int c = along_channels ? at.column : at.plane;
    const int row = (along_channels ? at.plane : at.row) - pad, column = (along_channels ? at.row : at.column) - pad;
    Bits<T>* to = reinterpret_cast<Bits<T>*>(halo.at(place(c), row, column));
    *to = window.shows(row, column) ? *from.at(c, window.y0 + row, window.x0 + column) : Bits<T>{0};
  }
}

// The tile without its halo, staged as [plane][pixel] with `plane` values each, back into an image.
template <int C, class T, class Place>
__device__ void store_tile(const Channels<T>& to, const T* staged, int plane, int rows, int cols, const Window& window,
                           Access access, Place place) {
  constexpr int kVector = 16 / sizeof(T);
  const Bits<T>* bits = reinterpret_cast<const Bits<T>*>(staged);
  if (access == Access::kTokens) {
    for (Walk at(rows, cols / kVector); at.plane < C; at.next()) {
      const int column = at.column * kVector;
      if (!window.shows(at.row, column)) continue;
      uint32_t words[4];
      load_words<4>(words, bits + place(at.plane) * plane + at.row * cols + column);
      store_words<4>(to.at(at.plane, window.y0 + at.row, window.x0 + column), words);
    }
    return;
  }
  if (access == Access::kChannels) {
    for (Walk at(cols, C / kVector); at.plane < rows; at.next()) {
      if (!window.shows(at.plane, at.row)) continue;
      const int c = at.column * kVector;
      uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const uint32_t x = bits[place(c + i) * plane + at.plane * cols + at.row];
        words[sizeof(T) == 4 ? i : i / 2] |= sizeof(T) == 4 ? x : x << (i % 2 * 16);
      }
      store_words<4>(to.at(c, window.y0 + at.plane, window.x0 + at.row), words);
    }
    return;
  }
  const bool along_channels = to.stride_c == 1;
  for (Walk at(along_channels ? cols : rows, along_channels ? C : cols); at.plane < (along_channels ? rows : C);
       at.next()) {
    const int c = along_channels ? at.column : at.plane;
    const int row = along_channels ? at.plane : at.row, column = along_channels ? at.row : at.column;
    if (window.shows(row, column)) {
      *to.at(c, window.y0 + row, window.x0 + column) = bits[place(c) * plane + row * cols + column];
    }
  }
}

// x[i] is pixel i - K / 2 of the row that goes through `first`, in float32.
template <int kPixels, int K, class T>
__device__ void load_row(float (&x)[kPixels + K - 1], const T* first) {
  constexpr int kPad = K / 2;
  if constexpr (sizeof(T) == 4) {
    uint32_t words[kPixels + 8];
    load_words<kPixels + 8>(words, first - 4);
#pragma unroll
    for (int i = 0; i < kPixels + K - 1; ++i) x[i] = __uint_as_float(words[4 - kPad + i]);
  } else {
    constexpr int kSide = (kPad + 1) / 2;  // words left and right of the lane's own
    uint32_t words[kSide + kPixels / 2 + kSide];
    load_words<kSide>(words, first - 2 * kSide);
    load_words<kPixels / 2>(words + kSide, first);
    load_words<kSide>(words + kSide + kPixels / 2, first + kPixels);
#pragma unroll
    for (int i = 0; i < kPixels + K - 1; ++i) {
      const int at = 2 * kSide - kPad + i;
      x[i] = at % 2 == 0 ? Packed<T>::low(words[at / 2]) : Packed<T>::high(words[at / 2]);
    }
  }
}

// A row of K taps, which begins at a multiple of 16 bytes.
template <int K>
__device__ void load_taps(float (&taps)[K], const float* row) {
  uint32_t words[tap_pitch(K)];
  load_words<tap_pitch(K)>(words, row);
#pragma unroll
  for (int i = 0; i < K; ++i) taps[i] = __uint_as_float(words[i]);
}

// acc += the depthwise convolution at kPixels neighbours of a row; `first` is the first of them, `pitch` a row.
// kUnroll: rows of taps under way at once, each of which takes registers.
template <int kPixels, int K, int kUnroll = K, class T>
__device__ void convolve(float (&acc)[kPixels], const T* first, int pitch, const float* taps) {
#pragma unroll kUnroll
  for (int dy = 0; dy < K; ++dy) {
    float x[kPixels + K - 1], tap[K];
    load_row<kPixels, K>(x, first + (dy - K / 2) * pitch);
    load_taps<K>(tap, taps + dy * tap_pitch(K));
#pragma unroll
    for (int dx = 0; dx < K; ++dx) {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) acc[i] += tap[dx] * x[i + dx];
    }
  }
}

// A stored value of a weight or bias, in float32.
template <class T>
__device__ float value_of(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *p;
  } else {
    return Packed<T>::low(element(p));
  }
}

// taps[place(c)][K][tap_pitch(K)] of channels `first` to first + C - 1 of a [channels, K, K] weight.
template <int C, int K, class T, class Place>
__device__ void load_all_taps(float* taps, const T* depthwise, int64_t first, Place place) {
  for (int e = threadIdx.x; e < C * K * K; e += blockDim.x) {
    const int c = e / (K * K), dy = e % (K * K) / K, dx = e % K;
    taps[(place(c) * K + dy) * tap_pitch(K) + dx] = value_of(depthwise + first * K * K + e);
  }
}

// Of a bias of all channels, or 0 where there is none.
template <class T>
__device__ float bias_at(const void* biases, int64_t channel) {
  return biases == nullptr ? 0.0f : value_of(static_cast<const T*>(biases) + channel);
}

}  // namespace efficientvit_kernels::cuda
