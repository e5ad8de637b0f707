// The backward of multiscale_aggregate, one scale at a time. With middle = P^T grad_out, the gradient of the depthwise
// convolution's result: grad_qkv = middle convolved with D flipped, grad_P = sum grad_out (D * qkv + b)^T, and
// grad_D[tap] = sum middle qkv shifted by the tap.
//
// A block has kChunk channels of the middle, of one part, and runs over tiles of all images. It computes the middle
// with its halo from all D channels of grad_out, and convolves both ways from shared memory. Every thread keeps its
// sums over pixels in registers until the block is done; a second kernel adds up the blocks' sums. No atomics.
//
// grad_out and P enter the matrix units exactly in TF32; D * qkv + b is rounded to it; the middle stays float32.
#pragma once

#include "multiscale_aggregate_kernels.cuh"

namespace efficientvit_kernels::cuda {

// Columns of a row of AggregateArgs::sums, which belongs to a channel c: grad_P[:, c], the taps, both biases of c.
constexpr int sums_columns(int head_dim, int size) { return head_dim + size * size + 2; }

// What a block has in shared memory.
template <class T, int D, int K>
struct GradTile {
  static constexpr int kMargin = halo_margin(sizeof(T));
  float* taps;     // [kChunk, K, tap_pitch]
  float* flipped;  // the same, in reverse
  float* weight;   // float32: P as [kChunk, D]
  Halo<T> grad;    // of grad_out, D planes
  Halo<T> x;       // of qkv, kChunk channels
  Halo<float> middle;
  float* hidden;  // [kChunk, pixels]: D * qkv + b
  int plane;      // of `hidden`
  T* staged;      // [kChunk, pixels]: grad_qkv
  int staged_plane;

  __device__ GradTile(unsigned char* shared, const AggregateArgs& args) {
    const int rows = args.rows, cols = args.cols;
    taps = reinterpret_cast<float*>(shared);
    flipped = taps + kChunk * K * tap_pitch(K);
    weight = flipped + kChunk * K * tap_pitch(K);
    grad = {reinterpret_cast<T*>(weight + (sizeof(T) == 4 ? kChunk * D : 0)),
            rows,
            cols,
            K / 2,
            kMargin,
            halo_plane(rows, cols, K, kMargin, sizeof(T), 8)};
    x = {grad.data + D * grad.plane, rows, cols, K / 2, kMargin, halo_plane(rows, cols, K, kMargin, sizeof(T), 4)};
    middle = {reinterpret_cast<float*>(x.data + kChunk * x.plane),
              rows,
              cols,
              K / 2,
              kMargin,
              halo_plane(rows, cols, K, kMargin, 4, 4)};
    hidden = middle.data + kChunk * middle.plane;
    plane = tile_plane(rows * cols, 4);
    staged = reinterpret_cast<T*>(hidden + kChunk * plane);
    staged_plane = tile_plane(rows * cols, sizeof(T));
  }
};

// P's rows for the middle, as operand B: the sum runs over grad_out's channels, the columns are the chunk's.
template <class T, int D>
struct MiddleWeights {
  uint32_t b[D / 8][2];
  __device__ void load(const T* pointwise, int chunk, int lane) {
#pragma unroll
    for (int step = 0; step < D / 8; ++step) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int o = lane % 4 * (D / 4) + 2 * step + e;
        b[step][e] = __float_as_uint(value_of(pointwise + o * D + chunk * kChunk + lane / 4));
      }
    }
  }
};

// middle = P^T grad_out on the tile and its halo; 0 outside the image, where D * qkv is none.
template <class T, int D, int K>
__device__ void compute_middle(const GradTile<T, D, K>& tile, const MiddleWeights<T, D>& weights,
                               const Window& window) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int across = tile.grad.cols / 8 + 2, segments = (tile.grad.rows + 2 * (K / 2)) * across;
  for (int first = threadIdx.x / 32 * 8; first < segments; first += blockDim.x / 4) {
    const int segment = min(first + g, segments - 1);
    const int row = segment / across - K / 2, column = segment % across * 8 - 8;
    const bool side = column < 0 || column >= tile.grad.cols;  // of which the halo is a part
    float acc[4][4] = {};
#pragma unroll
    for (int step = 0; step < D / 8; ++step) {
      uint32_t words[2][4];
      load_words<4>(words[0], tile.grad.at(8 * step + t, row, column));
      load_words<4>(words[1], tile.grad.at(8 * step + 4 + t, row, column));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t a[4] = {
            __float_as_uint(Packed<T>::low(words[0][i])), __float_as_uint(Packed<T>::high(words[0][i])),
            __float_as_uint(Packed<T>::low(words[1][i])), __float_as_uint(Packed<T>::high(words[1][i]))};
        mma_m16n8k8_tf32(acc[i], a, weights.b[step]);
      }
    }
    if (first + g >= segments) continue;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float* to = tile.middle.at(2 * t + e, row, column);
#pragma unroll
      for (int pixel = 0; pixel < 8; ++pixel) {
        const float value = acc[pixel / 2][pixel % 2 * 2 + e];
        const bool read = !side || (column + pixel >= -(K / 2) && column + pixel < tile.grad.cols + K / 2);
        if (read) to[pixel] = window.shows(row, column + pixel) ? value : 0.0f;
      }
    }
  }
}

// The same in float32, a pixel per thread.
template <int D, int K>
__device__ void compute_middle_fp32(const GradTile<float, D, K>& tile, const Window& window) {
  const int columns = tile.grad.cols + 2 * (K / 2), pixels = (tile.grad.rows + 2 * (K / 2)) * columns;
  for (int e = threadIdx.x; e < pixels; e += blockDim.x) {
    const int row = e / columns - K / 2, column = e % columns - K / 2;
    float sums[kChunk] = {};
    for (int plane = 0; plane < D; ++plane) {
      const float grad = *tile.grad.at(plane, row, column);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) sums[c] += tile.weight[c * D + channel_of<D>(plane)] * grad;
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) *tile.middle.at(c, row, column) = window.shows(row, column) ? sums[c] : 0.0f;
  }
}

// Rows of grad_P^T: the sum over pixels of grad_out (all D channels) times hidden (the chunk's).
template <class T, int D>
struct PointwiseSums {
  static constexpr int kTiles = (D + 15) / 16;
  float acc[kTiles][4] = {};

  // Each warp takes every kMaxWarps-th run of 32 pixels, lane t a segment of 8, row g a plane of grad_out.
  template <int K>
  __device__ void add(const GradTile<T, D, K>& tile) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, across = tile.grad.cols / 8;
    const int segments = tile.grad.rows * across;
    for (int segment = threadIdx.x / 32 * 4 + t; segment < segments; segment += blockDim.x / 8) {
      const int row = segment / across, column = segment % across * 8;
      uint32_t words[2 * kTiles][4], d[8];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        if (8 * i < D) load_words<4>(words[i], tile.grad.at(8 * i + g, row, column));
      }
      load_words<8>(d, tile.hidden + g * tile.plane + segment * 8);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t b[2] = {d[2 * step], d[2 * step + 1]};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const uint32_t low = words[2 * i][step], high = D > 8 ? words[2 * i + 1][step] : 0;
          const uint32_t a[4] = {__float_as_uint(Packed<T>::low(low)), __float_as_uint(Packed<T>::low(high)),
                                 __float_as_uint(Packed<T>::high(low)), __float_as_uint(Packed<T>::high(high))};
          mma_m16n8k8_tf32(acc[i], a, b);
        }
      }
    }
  }
  // Into sums[kChunk, columns] of the warp.
  __device__ void store(float* sums, int columns) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < (D > 8 ? 4 : 2); ++j) {
        sums[(2 * t + j % 2) * columns + channel_of<D>(16 * i + j / 2 * 8 + g)] = acc[i][j];
      }
    }
  }
};

// float32: a thread has every 32nd of a warp's D * kChunk sums, and every warp every kMaxWarps-th run of 4 pixels.
template <int D>
struct PointwiseSums<float, D> {
  static constexpr int kOwn = D * kChunk / 32;
  float acc[kOwn] = {};

  template <int K>
  __device__ void add(const GradTile<float, D, K>& tile) {
    const int lane = threadIdx.x % 32, across = tile.grad.cols / 4, groups = tile.grad.rows * across;
    for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
      const int row = group / across, column = group % across * 4;
      float d[4];
      load_floats(d, tile.hidden + lane % kChunk * tile.plane + group * 4);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        float x[4];
        load_floats(x, tile.grad.at(lane / kChunk + 4 * i, row, column));
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) acc[i] += x[pixel] * d[pixel];
      }
    }
  }
  __device__ void store(float* sums, int columns) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) sums[lane % kChunk * columns + channel_of<D>(lane / kChunk + 4 * i)] = acc[i];
  }

 private:
  __device__ static void load_floats(float (&x)[4], const float* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
};

template <class T, int D, int K>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && ((K == 3 && D < 64) || (K == 5 && D == 16)) ? 3 : 2)
    aggregate_gradients_kernel(AggregateArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr bool kFp32 = sizeof(T) == 4;
  constexpr int kPad = K / 2, kColumns = sums_columns(D, K);
  const GradTile<T, D, K> tile(shared, args);
  const int64_t id = blockIdx.x, part = id / (D / kChunk) % args.parts, run = id / (D / kChunk) / args.parts;
  const int chunk = static_cast<int>(id % (D / kChunk)), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = part * D, own_first = first + chunk * kChunk;  // channels
  const auto natural = [](int c) { return c; };

  load_all_taps<kChunk, K>(tile.taps, static_cast<const T*>(args.depthwise), own_first, natural);
  for (int e = threadIdx.x; e < kChunk * K * K; e += blockDim.x) {
    const int at = e / K * tap_pitch(K) + e % K, c = e / (K * K), tap = K * K - 1 - e % (K * K);
    tile.flipped[at] = value_of(static_cast<const T*>(args.depthwise) + (own_first + c) * K * K + tap);
  }
  const T* pointwise = static_cast<const T*>(args.pointwise) + first * D;
  MiddleWeights<T, D> weights;
  if constexpr (kFp32) {
    for (int e = threadIdx.x; e < kChunk * D; e += blockDim.x) {
      tile.weight[e] = pointwise[e % D * D + chunk * kChunk + e / D];
    }
  } else {
    weights.load(pointwise, chunk, lane);
  }
  // A thread has one channel of the chunk, and every 16th segment of a tile. At K = 7 the sums leave fewer registers.
  constexpr int kPixels = K == 7 ? 4 : 8;
  const int channel = threadIdx.x % kChunk;
  const float bias = bias_at<T>(args.depthwise_bias, own_first + channel);
  const float* taps = tile.taps + channel * K * tap_pitch(K);
  const float* flipped = tile.flipped + channel * K * tap_pitch(K);
  float tap_sums[K][K] = {}, middle_sum = 0.0f, grad_sum = 0.0f;
  PointwiseSums<T, D> pointwise_sums;

  const int64_t begin = run * args.tasks_per_run, end = min(begin + args.tasks_per_run, args.tasks);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / args.tiles;
    const Window window = window_of(args, task % args.tiles);
    __syncthreads();  // what the last tile left has been read
    load_halo<D>(tile.grad, Channels<T>(args.out, batch, first), window, args.access,
                 [](int c) { return plane_of<D>(c); });
    load_halo<kChunk>(tile.x, Channels<T>(args.qkv, batch, own_first), window, args.access, natural);
    if (args.adds) {
      const Halo<T> held{tile.staged, args.rows, args.cols, 0, 0, tile.staged_plane};
      load_halo<kChunk>(held, Channels<T>(args.grad_qkv, batch, own_first), window, args.access, natural);
    }
    __syncthreads();
    if constexpr (kFp32) {
      compute_middle_fp32(tile, window);
    } else {
      compute_middle(tile, weights, window);
    }
    __syncthreads();

    const int across = args.cols / kPixels;
    for (int segment = threadIdx.x / kChunk; segment < args.rows * across; segment += blockDim.x / kChunk) {
      const int row = segment / across, column = segment % across * kPixels;
      const int there = window.shows(row, column) ? min(kPixels, args.width - window.x0 - column) : 0;
      const T* x = tile.x.at(channel, row, column);
      const float* middle = tile.middle.at(channel, row, column);
      float own[kPixels], grad[kPixels] = {}, hidden[kPixels];
      load_row<kPixels, 1>(own, middle);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        middle_sum += own[i];
        hidden[i] = bias;
        grad_sum += value_of(tile.grad.at(plane_of<D>(chunk * kChunk + channel), row, column + i));
      }
#pragma unroll
      for (int dy = 0; dy < K; ++dy) {
        float x_row[kPixels + K - 1], tap[K];
        load_row<kPixels, K>(x_row, x + (dy - kPad) * tile.x.pitch());
        load_taps<K>(tap, taps + dy * tap_pitch(K));
#pragma unroll
        for (int dx = 0; dx < K; ++dx) {
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            hidden[i] += tap[dx] * x_row[i + dx];
            // Not 0 * inf: an infinite x reaches the taps of pixels that exist.
            tap_sums[dy][dx] += i < there ? own[i] * x_row[i + dx] : 0.0f;
          }
        }
      }
      float* to = tile.hidden + channel * tile.plane + segment * kPixels;
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        const float value = i < there ? hidden[i] : 0.0f;
        to[i] = kFp32 ? value : __uint_as_float(to_tf32(value));
      }
      if (!args.needs_qkv || there == 0) continue;
      convolve<kPixels, K, 1>(grad, middle, tile.middle.pitch(), flipped);
      if (args.grads_before != nullptr || args.grads_after != nullptr) {
        const int64_t at = (((batch * args.parts * D + own_first + channel) * args.height + window.y0 + row) *
                            static_cast<int64_t>(args.width)) +
                           window.x0 + column;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          if (i < there && args.grads_before != nullptr) grad[i] += args.grads_before[at + i];
          if (i < there && args.grads_after != nullptr) args.grads_after[at + i] = grad[i];
        }
      }
      T* staged = tile.staged + channel * tile.staged_plane + segment * kPixels;
      if (args.adds) {
        float held[kPixels];
        load_row<kPixels, 1>(held, staged);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) grad[i] += held[i];
      }
      if constexpr (kFp32) {
#pragma unroll
        for (int i = 0; i < kPixels; ++i) staged[i] = grad[i];
      } else {
        uint32_t words[kPixels / 2];
#pragma unroll
        for (int i = 0; i < kPixels / 2; ++i) words[i] = Packed<T>::pack(grad[2 * i], grad[2 * i + 1]);
        store_words<kPixels / 2>(staged, words);
      }
    }
    __syncthreads();
    if (args.needs_qkv && args.grads_after == nullptr) {
      store_tile<kChunk>(Channels<T>(args.grad_qkv, batch, own_first), tile.staged, tile.staged_plane, args.rows,
                         args.cols, window, args.access, natural);
    }
    if (args.sums != nullptr) pointwise_sums.add(tile);
  }
  if (args.sums == nullptr) return;

  // The sums of the warps, through shared memory; lanes 8 apart have the same channel.
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);  // [warps, kChunk, kColumns]
  float* own = sums + (warp * kChunk + channel) * kColumns + D;
  pointwise_sums.store(sums + warp * kChunk * kColumns, kColumns);
  const auto over_lanes = [](float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 8);
    return x + __shfl_xor_sync(0xffffffffu, x, 16);
  };
#pragma unroll
  for (int dy = 0; dy < K; ++dy) {
#pragma unroll
    for (int dx = 0; dx < K; ++dx) {
      const float total = over_lanes(tap_sums[dy][dx]);
      if (lane < kChunk) own[dy * K + dx] = total;
    }
  }
  middle_sum = over_lanes(middle_sum), grad_sum = over_lanes(grad_sum);
  if (lane < kChunk) own[K * K] = middle_sum, own[K * K + 1] = grad_sum;
  __syncthreads();
  float* to = args.sums + (run * args.parts * D + own_first) * kColumns;
  for (int e = threadIdx.x; e < kChunk * kColumns; e += blockDim.x) {
    to[e] = sum_of_splits(sums, blockDim.x / 32, kChunk * kColumns, e);
  }
}

// The runs' sums, added up in their order and rounded once, each where it belongs. What is null is not wanted.
struct AggregateGrads {
  const float* sums;     // [runs, channels, D + K * K + 2]
  void* pointwise;       // [channels, D]
  void* depthwise;       // [channels, K * K]
  void* depthwise_bias;  // [channels]
  void* pointwise_bias;
  int64_t runs, channels;
  int head_dim, taps;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sum_gradients_kernel(AggregateGrads args) {
  const int columns = args.head_dim + args.taps + 2;
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x, numel = args.channels * columns;
  if (i >= numel) return;
  const int64_t c = i / columns;
  const int column = static_cast<int>(i % columns), tap = column - args.head_dim;
  T* to;
  if (tap < 0) {
    const int64_t d = args.head_dim;
    to = static_cast<T*>(args.pointwise);
    if (to != nullptr) to += (c / d * d + column) * d + c % d;
  } else if (tap < args.taps) {
    to = static_cast<T*>(args.depthwise);
    if (to != nullptr) to += c * args.taps + tap;
  } else {
    to = static_cast<T*>(tap == args.taps ? args.depthwise_bias : args.pointwise_bias);
    if (to != nullptr) to += c;
  }
  if (to == nullptr) return;
  const float total = sum_of_splits(args.sums, args.runs, numel, i);
  if constexpr (sizeof(T) == 4) {
    *to = total;
  } else {
    store_element(to, Packed<T>::pack(total, 0.0f) & 0xffffu);
  }
}

}  // namespace efficientvit_kernels::cuda
