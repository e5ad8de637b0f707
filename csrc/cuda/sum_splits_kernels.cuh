// The second step of a sum that was split over tokens, where there are too many splits for every reader to add up.
#pragma once

#include "operands.cuh"

namespace efficientvit_kernels::cuda {

// sums[pair] = the sum over the splits of states[pair], in their order; `count` values, `numel` per pair.
__global__ void __launch_bounds__(kThreads, 2)
    sum_splits_kernel(const float* states, float* sums, int64_t splits, int numel, int64_t count) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  const int64_t pair = i / numel;
  sums[i] = sum_of_splits(states + pair * splits * numel, splits, numel, static_cast<int>(i % numel));
}

}  // namespace efficientvit_kernels::cuda
