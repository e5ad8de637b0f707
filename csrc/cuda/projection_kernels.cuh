// The projection of lite_mla with its epilogue, for 16-bit storage: y = scale * (W x) + shift + residual, in float32 to
// the end and rounded once. Device code only: the launcher is projection.cu, which leaves wide products to cuBLAS.
//
// A block has kProjectionRows channels of y by kTokens tokens of any images. Tiles of W and x, both with their channels
// side by side, come into shared memory asynchronously, two steps ahead of the products.
#pragma once

#include "projection_plan.h"
#include "rows_product.cuh"

namespace efficientvit_kernels::cuda {

struct ProjectionArgs {
  const void* x;       // [B, H * W, C], contiguous, aligned to 16 bytes; C a multiple of 8
  const void* weight;  // [O, C], as x
  const float* scale;  // [O], or null
  const float* shift;
  Image residual, y;                              // [B, O, H, W]; the residual's data may be null
  int64_t channels, out_channels, tokens, count;  // C, O, H * W, tokens of all images
  int64_t row_blocks;
  Access access;  // to y and the residual: kTokens is 4 at a time
};

// Rows first to first + kRows - 1 of a [count, channels] matrix, columns k to k + kProjectionStep - 1, into shared
// memory; 0 where there are none.
template <int kRows, class T>
__device__ void load_rows_async(T* to, const T* from, int64_t first, int64_t count, int64_t k, int64_t channels) {
  constexpr int kVectors = kProjectionStep / 8;
#pragma unroll
  for (int e = threadIdx.x; e < kRows * kVectors; e += kThreads) {
    const int row = e / kVectors, column = e % kVectors * 8;
    const bool there = first + row < count && k + column < channels;
    cp_async_16(to + row * kProjectionPitch + column, there ? from + (first + row) * channels + k + column : from,
                there);
  }
}

// value[i] of kCount neighbours along tokens (kChannels: along channels) of y, from the products in shared memory.
template <class T, int kCount>
__device__ void finish(const ProjectionArgs& args, float (&values)[kCount], const uint32_t (&residual)[kCount / 2],
                       int64_t channel, bool along_channels, uint32_t (&words)[kCount / 2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t c = along_channels ? channel + i : channel;
    if (args.scale != nullptr) values[i] *= args.scale[c];
    if (args.shift != nullptr) values[i] += args.shift[c];
    values[i] += i % 2 == 0 ? Packed<T>::low(residual[i / 2]) : Packed<T>::high(residual[i / 2]);
  }
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) words[i] = Packed<T>::pack(values[2 * i], values[2 * i + 1]);
}

template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads, 2) projection_kernel(ProjectionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kColumns = kTokens / 16;  // products of 8 tokens of a warp, which has half the rows by half the tokens
  constexpr int kRowsOfStage = kProjectionRows + kTokens;
  T* stages = reinterpret_cast<T*>(shared);  // [kProjectionStages, W's rows then x's, kProjectionPitch]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = blockIdx.x % args.row_blocks * kProjectionRows;
  const int64_t first_token = blockIdx.x / args.row_blocks * kTokens;
  const auto load = [&](int64_t step) {
    T* stage = stages + step % kProjectionStages * kRowsOfStage * kProjectionPitch;
    const int64_t k = step * kProjectionStep;
    if (k < args.channels) {
      load_rows_async<kProjectionRows>(stage, static_cast<const T*>(args.weight), first_row, args.out_channels, k,
                                       args.channels);
      load_rows_async<kTokens>(stage + kProjectionRows * kProjectionPitch, static_cast<const T*>(args.x), first_token,
                               args.count, k, args.channels);
    }
    cp_async_commit();  // an empty group, too: the waits count them
  };

  float acc[2][kColumns][4] = {};
  const int row = warp / 2 * 32, token = warp % 2 * (kTokens / 2);
  const int64_t steps = ceil_div(args.channels, kProjectionStep);
#pragma unroll
  for (int step = 0; step < kProjectionStages - 1; ++step) load(step);
  for (int64_t step = 0; step < steps; ++step) {
    cp_async_wait<kProjectionStages - 2>();
    __syncthreads();  // this stage is there for all, and the one that is loaded next has been read
    load(step + kProjectionStages - 1);
    const T* stage = stages + step % kProjectionStages * kRowsOfStage * kProjectionPitch;
#pragma unroll
    for (int k = 0; k < kProjectionStep; k += 16) {
      uint32_t a[2][4], b[kColumns / 2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ldmatrix_x4(a[i], stage + (row + 16 * i + lane % 16) * kProjectionPitch + k + lane / 16 * 8);
      }
#pragma unroll
      for (int j = 0; j < kColumns / 2; ++j) {
        const int at = kProjectionRows + token + 16 * j + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(b[j], stage + at * kProjectionPitch + k + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const uint32_t operand[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          mma_m16n8k16(acc[i][j], a[i], operand, stage);
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();

  // [kProjectionRows, kTokens] sums, so that y is written as it is stored.
  constexpr int kPitch = kTokens + 4;
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums[(row + 16 * i + e / 2 * 8 + lane / 4) * kPitch + token + 8 * j + lane % 4 * 2 + e % 2] = acc[i][j][e];
      }
    }
  }
  __syncthreads();
  const auto offset = [&](const Image& image, int64_t c, int64_t n) {
    const int64_t batch = n / args.tokens, of_image = n % args.tokens, y = of_image / image.width;
    return batch * image.stride_b + c * image.stride_c + y * image.stride_h + of_image % image.width * image.stride_w;
  };
  T *y = static_cast<T*>(args.y.data), *residual = static_cast<T*>(args.residual.data);
  if (args.access == Access::kChannels) {
    for (Walk at(kTokens, kProjectionRows / 8); at.plane < 1; at.next()) {
      const int64_t n = first_token + at.row, c = first_row + at.column * 8;
      if (n >= args.count || c >= args.out_channels) continue;
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = sums[(at.column * 8 + i) * kPitch + at.row];
      uint32_t words[4], extra[4] = {0, 0, 0, 0};
      if (residual != nullptr) load_words<4>(extra, residual + offset(args.residual, c, n));
      finish<T, 8>(args, values, extra, c, true, words);
      store_words<4>(y + offset(args.y, c, n), words);
    }
  } else if (args.access == Access::kTokens) {
    for (Walk at(kProjectionRows, kTokens / 4); at.plane < 1; at.next()) {
      const int64_t n = first_token + at.column * 4, c = first_row + at.row;
      if (n >= args.count || c >= args.out_channels) continue;
      float values[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = sums[at.row * kPitch + at.column * 4 + i];
      uint32_t words[2], extra[2] = {0, 0};
      if (residual != nullptr) load_words<2>(extra, residual + offset(args.residual, c, n));
      finish<T, 4>(args, values, extra, c, false, words);
      store_words<2>(y + offset(args.y, c, n), words);
    }
  } else {
    const bool along_channels = args.y.stride_c == 1;
    for (Walk at(along_channels ? kTokens : kProjectionRows, along_channels ? kProjectionRows : kTokens); at.plane < 1;
         at.next()) {
      const int i = along_channels ? at.column : at.row, j = along_channels ? at.row : at.column;
      const int64_t n = first_token + j, c = first_row + i;
      if (n >= args.count || c >= args.out_channels) continue;
      float values[2] = {sums[i * kPitch + j], 0.0f};
      uint32_t words[1], extra[1] = {0};
      if (residual != nullptr) extra[0] = element(residual + offset(args.residual, c, n));
      finish<T, 2>(args, values, extra, c, false, words);
      store_element(y + offset(args.y, c, n), words[0] & 0xffffu);
    }
  }
}

}  // namespace efficientvit_kernels::cuda
