// CUDA's built-in functions and variables, one kernel for each kind.
#include "entry.h"

__device__ __forceinline__ int block_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

// 12 numbers per thread.
__global__ void indices(const float*, float* out, int, int) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  float* o = out + 12 * (block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + block_thread());
  const unsigned values[12] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                               blockDim.x,  blockDim.y,  blockDim.z,  gridDim.x,  gridDim.y,  gridDim.z};
#pragma unroll
  for (int i = 0; i < 12; ++i) o[i] = static_cast<float>(values[i]);
}

// out [8, threads]: each shuffle, of a float and of a long long, by `distance` in parts of `width` lanes.
__global__ void shuffles(const float* in, float* out, int distance, int width) {
  const int t = threadIdx.x, n = blockDim.x;
  const unsigned all = 0xffffffffu;
  const float x = in[t];
  const long long y = static_cast<long long>(x) << 33;
  out[t] = __shfl_sync(all, x, distance, width);
  out[n + t] = __shfl_xor_sync(all, x, distance, width);
  out[2 * n + t] = __shfl_down_sync(all, x, distance, width);
  out[3 * n + t] = __shfl_up_sync(all, x, distance, width);
  out[4 * n + t] = static_cast<float>(__shfl_sync(all, y, distance, width) >> 33);
  out[5 * n + t] = static_cast<float>(__shfl_xor_sync(all, y, distance, width) >> 33);
  out[6 * n + t] = static_cast<float>(__shfl_down_sync(all, y, distance, width) >> 33);
  out[7 * n + t] = static_cast<float>(__shfl_up_sync(all, y, distance, width) >> 33);
}

// Lanes below `split` shuffle among themselves, and so do the others, in branches of their own. out [threads].
__global__ void split_warp(const float* in, float* out, int split, int) {
  const int t = threadIdx.x, lane = t % warpSize;
  const unsigned low = split == 32 ? 0xffffffffu : (1u << split) - 1;
  float sum = 0;
  if (lane < split) {
    for (int source = 0; source < split; ++source) sum += __shfl_sync(low, in[t], source);
    __syncwarp(low);
  } else {
    for (int source = split; source < 32; ++source) sum += __shfl_sync(~low, in[t], source);
    __syncwarp(~low);
  }
  out[t] = sum;
}

// out [4, threads]: ballot's halves, any, all.
__global__ void votes(const float* in, float* out, int, int) {
  const int t = threadIdx.x, n = blockDim.x;
  const unsigned ballot = __ballot_sync(0xffffffffu, in[t] > 0);
  out[t] = static_cast<float>(ballot & 0xffffu);
  out[n + t] = static_cast<float>(ballot >> 16);
  out[2 * n + t] = static_cast<float>(__any_sync(0xffffffffu, in[t] > 0));
  out[3 * n + t] = static_cast<float>(__all_sync(0xffffffffu, in[t] > 0));
}

// out [3 + 3 * threads]: the sums, then what each addition returned.
__global__ void atomics(const float* in, float* out, int, int) {
  const int t = threadIdx.x, n = blockDim.x;
  EVK_DYNAMIC_SHARED(shared);
  int* counts = reinterpret_cast<int*>(shared);
  if (t < 2) counts[t] = 0;
  __syncthreads();
  out[3 + t] = atomicAdd(out, __ldg(in + t));
  out[3 + n + t] = static_cast<float>(atomicAdd(counts, -1));
  out[3 + 2 * n + t] = static_cast<float>(atomicAdd(reinterpret_cast<unsigned*>(counts) + 1, 2u));
  __threadfence();
  __syncthreads();
  if (t < 2) out[1 + t] = static_cast<float>(counts[t]);
}

// out [6, threads], of the threads' pairs in [2, threads].
__global__ void extremes(const float* in, float* out, int, int) {
  const int t = threadIdx.x, n = blockDim.x;
  const float x = in[t], y = in[n + t];
  const int i = isnan(x) ? 0 : static_cast<int>(x), j = isnan(y) ? 0 : static_cast<int>(y);
  out[t] = min(x, y);
  out[n + t] = max(x, y);
  out[2 * n + t] = static_cast<float>(min(i, j));
  out[3 * n + t] = static_cast<float>(max(static_cast<int64_t>(i), static_cast<int64_t>(j)));
  // Mixed signs compare as unsigned: -1 is the greatest.
  out[4 * n + t] = min(i, 7u) == 7u ? 1.0f : 0.0f;
  out[5 * n + t] = static_cast<float>(__popc(static_cast<unsigned>(i)) + 100 * __clz(j) + __ffs(j));
}

// Threads from `leavers` on leave at once; the others pass two barriers and a sum over the lanes that are left.
__global__ void early_exit(const float* in, float* out, int leavers, int) {
  const int t = threadIdx.x;
  EVK_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  if (t >= leavers) return;
  values[t] = in[t];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < leavers; ++i) sum += values[i];
  __syncthreads();
  values[t] = sum;
  __syncwarp();
  // The lane that is read may have left, and then gives NaN.
  out[t] = values[t] + 0.0f * __shfl_xor_sync(0xffffffffu, sum, 16);
}

// What a block finds in the shared memory that it has not written. out [threads].
__global__ void unwritten(const float*, float* out, int, int) {
  EVK_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1.0f;
}

// out[0]: the index of the block that came last, or with `first` that of the first.
__global__ void last_block(const float*, float* out, int first, int) {
  if (!first || isnan(out[0])) out[0] = static_cast<float>(blockIdx.x + gridDim.x * blockIdx.y);
}

// A variable that nobody has set, after another function has used the stack. out [threads].
__device__ float unset_variable(int index) {
  float values[8];
  return values[index];
}

__global__ void unset(const float*, float* out, int index, int) { out[threadIdx.x] = unset_variable(index); }

EVK_SAMPLE(indices)
EVK_SAMPLE(shuffles)
EVK_SAMPLE(split_warp)
EVK_SAMPLE(votes)
EVK_SAMPLE(atomics)
EVK_SAMPLE(extremes)
EVK_SAMPLE(early_exit)
EVK_SAMPLE(unwritten)
EVK_SAMPLE(last_block)
EVK_SAMPLE(unset)

#if !defined(__CUDACC__)
extern "C" __attribute__((visibility("default"))) int64_t launches() { return emulator::launches(); }
extern "C" __attribute__((visibility("default"))) void set_shared_limit(int bytes) {
  emulator::device().max_shared_per_block = bytes;
}
#endif
