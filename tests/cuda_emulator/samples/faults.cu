// Kernels that are right, and at the choice of the caller wrong in one way each. test_faults.py names the faults by
// their number and says what catches each.
#include "entry.h"
#include "ptx.cuh"

namespace ptx = efficientvit_kernels::cuda;

enum Fault {
  kNone,
  kNoBarrierAfterCopy,
  kNoBarrierBeforeReuse,
  kNoBarrierBeforeTotal,
  kDivergentBarrier,
  kUnmaskedTail,
  kOverrunOfShared,
  kUnderrunOfShared,
  kReluDropsNan,
  kNoWait,
  kNoCommit,
  kWaitTooEarly,
  kHalfMask,
  kHalfDistance,
  kNoSyncWarp,
  kSwappedFragments,
  kSwappedHalves,
};

constexpr int kThreads = 128;

__device__ __forceinline__ float relu(float x, int fault) {
  if (fault == kReluDropsNan) return fmaxf(x, 0.0f);
  return x < 0.0f ? 0.0f : x;
}

__device__ __forceinline__ float sum_of_warp(float x, int fault) {
  const unsigned mask = fault == kHalfMask ? 0xffffu : 0xffffffffu;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x += __shfl_xor_sync(mask, x, fault == kHalfDistance ? distance / 2 : distance);
  return x;
}

// One block per row of n: out = relu(x) / (sum of relu(x) + 1e-15), the sum through a pipeline of two tiles in shared
// memory, which each thread reads where another one has copied to. Shared: 2 * 128 + 4 floats.
__global__ void __launch_bounds__(kThreads) normalise(const float* in, float* out, int n, int fault) {
  EVK_DYNAMIC_SHARED(shared);
  float* tiles = reinterpret_cast<float*>(shared);
  float* partial = tiles + 2 * kThreads;
  const int t = threadIdx.x, warp = t / 32;
  const float* row = in + static_cast<int64_t>(blockIdx.x) * n;

  auto load = [&](int start, int stage) {
    const int i = start + t;
    const bool valid = i < n || fault == kUnmaskedTail;
    ptx::cp_async_4(tiles + stage * kThreads + t, row + (valid ? i : 0), valid);
  };
  load(0, 0);
  if (fault != kNoCommit) ptx::cp_async_commit();
  float sum = 0.0f;
  for (int start = 0, stage = 0; start < n; start += kThreads, stage ^= 1) {
    if (start + kThreads < n) load(start + kThreads, stage ^ 1);
    if (fault != kNoCommit) ptx::cp_async_commit();
    if (fault == kWaitTooEarly) ptx::cp_async_wait<2>();
    if (fault != kNoWait && fault != kWaitTooEarly) ptx::cp_async_wait<1>();
    if (fault != kNoBarrierAfterCopy) __syncthreads();
    sum += relu(tiles[stage * kThreads + kThreads - 1 - t], fault);
    if (fault != kNoBarrierBeforeReuse && !(fault == kDivergentBarrier && warp == 2)) __syncthreads();
  }
  sum = sum_of_warp(sum, fault);
  int place = warp;
  if (fault == kOverrunOfShared) place += 1;
  if (fault == kUnderrunOfShared) place = warp ? warp : -2 * kThreads - 1;
  if (t % 32 == 0) partial[place] = sum;
  if (fault != kNoBarrierBeforeTotal) __syncthreads();
  const float total = partial[0] + partial[1] + partial[2] + partial[3];
  for (int i = t; i < n; i += kThreads)
    out[static_cast<int64_t>(blockIdx.x) * n + i] = relu(row[i], fault) / (total + 1e-15f);
}

// out [16, 8] = A [16, 8] B [8, 8] in TF32, one warp; B goes through shared memory, 64 floats.
__global__ void multiply(const float* in, float* out, int, int fault) {
  EVK_DYNAMIC_SHARED(shared);
  float* b_shared = reinterpret_cast<float*>(shared);
  const int t = threadIdx.x, g = t / 4, c = t % 4;
  for (int i = t; i < 64; i += 32) b_shared[i] = in[128 + i];
  if (fault != kNoSyncWarp) __syncwarp();
  const uint32_t b[2] = {ptx::to_tf32(b_shared[8 * c + g]), ptx::to_tf32(b_shared[8 * (c + 4) + g])};
  const uint32_t swapped_b[2] = {b[1], b[0]};
  const uint32_t a[4] = {ptx::to_tf32(in[8 * g + c]), ptx::to_tf32(in[8 * (g + 8) + c]),
                         ptx::to_tf32(in[8 * g + c + 4]), ptx::to_tf32(in[8 * (g + 8) + c + 4])};
  const uint32_t swapped_a[4] = {a[0], a[2], a[1], a[3]};
  float d[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k8_tf32(d, fault == kSwappedFragments ? swapped_a : a, fault == kSwappedHalves ? swapped_b : b);
  for (int i = 0; i < 4; ++i) out[8 * (g + 8 * (i / 2)) + 2 * c + i % 2] = d[i];
}

// Without its barrier each thread reads what another warp, a lower or a higher one, may not have written yet.
__global__ void neighbours(const float* in, float* out, int distance, int barrier) {
  EVK_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const int t = threadIdx.x, n = blockDim.x;
  values[t] = in[t];
  if (barrier) __syncthreads();
  const int from = t + distance;
  out[t] = values[from < 0 || from >= n ? t : from];
}

// out[0] += sum of in, one block per element, atomically or not. Blocks run one after another, so the sum is right in
// both; ThreadSanitizer alone sees the race.
__global__ void accumulate(const float* in, float* out, int, int atomic) {
  if (threadIdx.x != blockIdx.x % blockDim.x) return;
  if (atomic)
    atomicAdd(out, in[blockIdx.x]);
  else
    out[0] += in[blockIdx.x];
}

// out [threads, 4] = in, from an address that is `offset` floats beyond a multiple of 16 bytes.
__global__ void vectors(const float* in, float* out, int offset, int) {
  const float4 x = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + offset);
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

EVK_SAMPLE(normalise)
EVK_SAMPLE(multiply)
EVK_SAMPLE(neighbours)
EVK_SAMPLE(accumulate)
EVK_SAMPLE(vectors)
