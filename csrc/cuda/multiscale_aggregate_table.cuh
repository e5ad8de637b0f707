// The table of the kernels for a storage type; see multiscale_aggregate.h.
#pragma once

#include "multiscale_aggregate.h"
#include "multiscale_aggregate_backward_kernels.cuh"

namespace efficientvit_kernels::cuda {

template <class T>
AggregateKernels aggregate_kernels(int64_t head_dim, int64_t size) {
  return for_head_dim(head_dim, [=](auto dim) {
    return for_kernel_size(size, [](auto taps) -> AggregateKernels {
      constexpr int D = decltype(dim)::value, K = decltype(taps)::value;
      return {aggregate_kernel<T, D, K>, aggregate_gradients_kernel<T, D, K>};
    });
  });
}

}  // namespace efficientvit_kernels::cuda
