// multiscale_aggregate, one scale at a time: out = P (D * qkv + b) + c. Device code only: the launcher is
// multiscale_aggregate.cu, the backward multiscale_aggregate_backward_kernels.cuh.
//
// A block has D channels, the q, k or v of a head, of a tile of an image. The depthwise convolution reads the tile from
// shared memory; its result goes from registers into the matrix units as operand A, two channels per lane at a time, so
// that it is never stored. TF32 holds P exactly, and D * qkv is rounded to it; float32 storage multiplies in float32.
#pragma once

#include "image_tile.cuh"
#include "operands.cuh"

namespace efficientvit_kernels::cuda {

struct AggregateArgs {
  Image qkv;                   // [B, parts * D, H, W]
  Image out;                   // as qkv: the result of the scale, or its gradient
  Image grad_qkv;              // as qkv
  const void* depthwise;       // [parts * D, K, K], contiguous as all weights
  const void* pointwise;       // [parts * D, D]
  const void* depthwise_bias;  // [parts * D], or null
  const void* pointwise_bias;
  const float* grads_before;  // [B, parts * D, H, W], contiguous: what other scales gave grad_qkv, or null
  float* grads_after;         // the same with this scale's, instead of grad_qkv, or null
  float* sums;                // [runs, parts * D, D + K * K + 2], or null: see the backward
  int64_t parts;
  int64_t tiles_x, tiles;         // of an image
  int64_t tasks, tasks_per_run;   // tiles of all images
  int height, width, rows, cols;  // of an image, of a tile
  Access access;                  // to rows of pixels
  bool needs_qkv;
  bool adds;  // to what grad_qkv holds, before it is rounded
};

// The tile of a task, and the rows of the weights that go with a part.
__device__ inline Window window_of(const AggregateArgs& args, int64_t tile) {
  return {args.height, args.width, static_cast<int>(tile / args.tiles_x) * args.rows,
          static_cast<int>(tile % args.tiles_x) * args.cols};
}

template <class T, int D, int K>
__global__ void __launch_bounds__(kThreads, 2) aggregate_kernel(AggregateArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr bool kFp32 = sizeof(T) == 4;
  constexpr int kPixels = lane_pixels(D), kPairs = kPixels / 2, kMargin = halo_margin(sizeof(T));
  const auto place = [](int c) { return plane_of<D>(c); };
  float* weight = reinterpret_cast<float*>(shared);  // P: for the matrix units as operand B
  float* taps = weight + D * D;                      // [D, K, tap_pitch]
  float* biases = taps + D * K * tap_pitch(K);       // the depthwise one by planes, the pointwise one by channels
  const Halo<T> halo{reinterpret_cast<T*>(biases + 2 * D),
                     args.rows,
                     args.cols,
                     K / 2,
                     kMargin,
                     halo_plane(args.rows, args.cols, K, kMargin, sizeof(T), 8)};
  float* hidden = reinterpret_cast<float*>(halo.data + D * halo.plane);  // float32: D * qkv, then the result
  const int64_t id = blockIdx.x, part = id / args.tiles % args.parts, batch = id / args.tiles / args.parts;
  const int64_t first = part * D;  // channel
  const Window window = window_of(args, id % args.tiles);

  load_all_taps<D, K>(taps, static_cast<const T*>(args.depthwise), first, place);
  for (int e = threadIdx.x; e < D * D; e += blockDim.x) {
    weight[kFp32 ? e : operand_index<D>(e % D, e / D)] =
        value_of(static_cast<const T*>(args.pointwise) + first * D + e);
  }
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    biases[place(c)] = bias_at<T>(args.depthwise_bias, first + c);
    biases[D + c] = bias_at<T>(args.pointwise_bias, first + c);
  }
  load_halo<D>(halo, Channels<T>(args.qkv, batch, first), window, args.access, place);
  __syncthreads();

  // A lane has kPixels neighbours of a row, and the channels that `TokenFragment` would give it.
  const int lane = threadIdx.x % 32, t = lane % 4, across = args.cols / kPixels;
  const int segment = static_cast<int>(threadIdx.x) / 4;
  const T* own = halo.at(t, segment / across, segment % across * kPixels);
  const int plane = tile_plane(args.rows * args.cols, sizeof(T));
  T* staged = kFp32 ? reinterpret_cast<T*>(hidden) : halo.data;
  float acc[kPairs][D / 8][4] = {};
#pragma unroll 1
  for (int step = 0; step < D / 8; ++step) {
    float x[2][kPixels];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = 4 * (2 * step + e);  // planes from the lane's first
#pragma unroll
      for (int i = 0; i < kPixels; ++i) x[e][i] = biases[at + t];
      convolve<kPixels, K>(x[e], own + at * halo.plane, halo.pitch(), taps + (at + t) * K * tap_pitch(K));
      if constexpr (kFp32) {
        float* to = hidden + channel_of<D>(at + t) * plane + segment * kPixels;
#pragma unroll
        for (int i = 0; i < kPixels; ++i) to[i] = x[e][i];
      }
    }
    if constexpr (!kFp32) {
      uint32_t a[kPairs][4];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) a[i / 2][i % 2 + 2 * e] = to_tf32(x[e][i]);
      }
#pragma unroll
      for (int column = 0; column < D / 8; ++column) {
        uint32_t b[2];
        shared_pair(b, reinterpret_cast<uint32_t*>(weight) + ((step * (D / 8) + column) * 32 + lane) * 2);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) mma_m16n8k8_tf32(acc[i][column], a[i], b);
      }
    }
  }
  __syncthreads();  // the halo has been read, and `hidden` is whole
  if constexpr (kFp32) {
    for (int pixel = threadIdx.x; pixel < args.rows * args.cols; pixel += blockDim.x) {
      float x[D];
#pragma unroll
      for (int c = 0; c < D; ++c) x[c] = hidden[c * plane + pixel];
      for (int o = 0; o < D; ++o) {
        float sum = biases[D + o];
#pragma unroll
        for (int c = 0; c < D; ++c) sum += weight[o * D + c] * x[c];
        hidden[o * plane + pixel] = sum;  // this thread alone has read this pixel
      }
    }
    __syncthreads();
    store_tile<D>(Channels<T>(args.out, batch, first), staged, plane, args.rows, args.cols, window, args.access,
                  [](int c) { return c; });
  } else {
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float bias = biases[D + t * (D / 4) + 2 * j + e];
        uint32_t words[kPairs];
#pragma unroll
        for (int i = 0; i < kPairs; ++i) words[i] = Packed<T>::pack(acc[i][j][e] + bias, acc[i][j][2 + e] + bias);
        store_words<kPairs>(staged + (4 * (2 * j + e) + t) * plane + segment * kPixels, words);
      }
    }
    __syncthreads();
    store_tile<D>(Channels<T>(args.out, batch, first), staged, plane, args.rows, args.cols, window, args.access, place);
  }
}

}  // namespace efficientvit_kernels::cuda
