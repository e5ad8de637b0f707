// The table of the kernels for a storage type; see aggregate_attention.h.
#pragma once

#include "aggregate_attention.h"
#include "aggregate_attention_apply_kernels.cuh"

namespace efficientvit_kernels::cuda {

template <class T>
AggregateAttentionKernels aggregate_attention_kernels(int64_t head_dim, int64_t size) {
  return for_kernel_size(size, [=](auto taps) -> AggregateAttentionKernels {
    constexpr int K = decltype(taps)::value;
    if (head_dim == 8) return {aggregate_kv_state_kernel<T, 8, K>, aggregate_apply_kernel<T, 8, K>};
    if (head_dim == 16) return {aggregate_kv_state_kernel<T, 16, K>, aggregate_apply_kernel<T, 16, K>};
    return {aggregate_kv_state_kernel<T, 32, K>, aggregate_apply_kernel<T, 32, K>};
  });
}

}  // namespace efficientvit_kernels::cuda
