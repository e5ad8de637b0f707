// A small kernel with one of everything that a mutant changes: strides, masks, barriers, copies, fragments, an eps.
#include "entry.h"
#include "ptx.cuh"

namespace ptx = efficientvit_kernels::cuda;

constexpr int kChannels = 16, kTile = 32, kHeight = 5;

// [channels, height, width]; strides in elements.
struct Image {
  const float* data;
  int64_t stride_c, stride_h, stride_w;
  int width;

  __device__ int64_t offset(int channel, int token) const {
    return channel * stride_c + token / width * stride_h + token % width * stride_w;
  }
};

// NaN stays NaN.
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

__device__ __forceinline__ float sum_of_warp(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Copies `kTile` tokens from `start` on to tile [channels, kTile]; zeros beyond the last one.
__device__ __forceinline__ void load_tile(float* tile, const Image& image, int start, int tokens) {
  for (int i = threadIdx.x; i < kChannels * kTile; i += blockDim.x) {
    const int channel = i / kTile, token = start + i % kTile;
    const bool valid = token < tokens;
    ptx::cp_async_4(tile + i, image.data + (valid ? image.offset(channel, token) : 0), valid);
  }
  ptx::cp_async_commit();
}

// d [16, 8] += relu(tile) relu(tile's first 8 channels)^T, by one warp.
__device__ __forceinline__ void multiply(float (&d)[4], const float* tile) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  auto at = [&](int channel, int token) { return ptx::to_tf32(relu(tile[channel * kTile + token])); };
  for (int token = c; token < kTile; token += 8) {
    uint32_t a[4], b[2];
    a[0] = at(g, token);
    a[1] = at(g + 8, token);
    a[2] = at(g, token + 4);
    a[3] = at(g + 8, token + 4);
    b[0] = a[0];
    b[1] = a[2];
    ptx::mma_m16n8k8_tf32(d, a, b);
  }
}

// Two warps. out: gram [16, 8] of the channels' relu, then relu(x) / (its sum over the tokens + eps), [channels,
// tokens].
__global__ void gram(const float* in, float* out, int width, int channels_last) {
  EVK_DYNAMIC_SHARED(shared);
  float* tile = reinterpret_cast<float*>(shared);
  float* sums = tile + kChannels * kTile;
  const int tokens = kHeight * width, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float eps = 0.25f;
  Image image{in, tokens, width, 1, width};
  if (channels_last) image = {in, 1, width * kChannels, kChannels, width};

  float d[4] = {};
  if (threadIdx.x < kChannels) sums[threadIdx.x] = 0.0f;
  for (int start = 0; start < tokens; start += kTile) {
    load_tile(tile, image, start, tokens);
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (warp == 0) multiply(d, tile);
    for (int channel = warp; channel < kChannels; channel += 2) {
      const float sum = sum_of_warp(relu(tile[channel * kTile + lane]));
      if (lane == 0) sums[channel] += sum;
    }
    __syncthreads();
  }
  if (warp == 0) {
    for (int i = 0; i < 4; ++i) out[8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2] = d[i];
  }
  for (int i = threadIdx.x; i < kChannels * tokens; i += blockDim.x) {
    const int channel = i / tokens, token = i % tokens;
    out[128 + i] = relu(image.data[image.offset(channel, token)]) / (sums[channel] + eps);
  }
}

EVK_SAMPLE(gram)
