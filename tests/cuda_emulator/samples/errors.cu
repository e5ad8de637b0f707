// Each kernel does something that CUDA forbids; test_emulator_errors.py has the words that it must give.
#include "entry.h"
#include "ptx.cuh"

namespace ptx = efficientvit_kernels::cuda;

__device__ __forceinline__ void mma(float* out) {
  float d[4] = {0, 0, 0, 0};
  const uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
  ptx::mma_m16n8k8_tf32(d, a, b);
  out[threadIdx.x] = d[0];
}

// The first `some` threads do one thing and the others another.
__global__ void barriers(const float*, float* out, int some, int form) {
  const int t = threadIdx.x;
  if (form == 0 && t < some) __syncthreads();
  if (form == 0 && t >= some) __syncwarp(0xffffffffu);
  if (form == 1 && t < some) __syncthreads();
  if (form == 1 && t >= some) __syncthreads();
  if (form == 2 && t < some) __syncwarp();
  if (form == 2 && t >= some) __syncthreads();
  out[t] = 0.0f;
}

__global__ void warps(const float*, float* out, int some, int form) {
  const int t = threadIdx.x;
  const bool first = t % 32 < some;
  float x = 1.0f;
  if (form == 0 && first) mma(out);
  if (form == 1) {
    if (first) return;
    mma(out);
  }
  if (form == 2 && first) x = __shfl_xor_sync(0xffffffffu, x, 1);
  if (form == 2 && !first) x = __shfl_down_sync(0xffffffffu, x, 1);
  if (form == 3 && first) x = __shfl_xor_sync(0xffffffffu, x, 1);
  if (form == 3 && !first) x = __shfl_xor_sync(0xffffffffu, x, 1);
  if (form == 4) x = __shfl_xor_sync(first ? 0xffffffffu : 0xffff0001u | 1u << (t % 32), x, 1);
  if (form == 5) x = __shfl_xor_sync(0xffffffffu, x, 1, 3);
  out[t] = x;
}

__global__ void addresses(const float* in, float* out, int offset, int form) {
  EVK_DYNAMIC_SHARED(shared);
  uint32_t r[4] = {0, 0, 0, 0};
  const char* global = reinterpret_cast<const char*>(in);
  if (form == 0) ptx::ldmatrix_x4(r, shared + offset);
  if (form == 1) ptx::cp_async_16(shared + offset, global, true);
  if (form == 2) ptx::cp_async_16(shared, global + offset, true);
  if (form == 3) ptx::cp_async_8(shared, global + offset, true);
  if (form == 4) ptx::cp_async_4(shared, global + offset, false);
  if (form == 5) ptx::cp_async_4(out, global, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[threadIdx.x] = __uint_as_float(r[0]);
}

// Calls itself until its stack is `room` bytes from its end, whatever its size is rounded to.
__device__ float descend(const volatile float* first, int room) {
  volatile float here[16];
  here[0] = 1.0f;
  const auto end = (reinterpret_cast<uintptr_t>(first) | 4095) + 1 - 64 * 1024;
  if (reinterpret_cast<uintptr_t>(here) > end + room) return descend(first, room) + here[0];
  return here[0];
}

__global__ void deep(const float*, float* out, int room, int) {
  volatile float first = 0.0f;
  out[threadIdx.x] = threadIdx.x == 1 ? descend(&first, room) : 1.0f;
}

EVK_SAMPLE(barriers)
EVK_SAMPLE(warps)
EVK_SAMPLE(addresses)
EVK_SAMPLE(deep)
