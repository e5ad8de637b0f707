// The table of the kernels for a 16-bit storage type; see relu_linear_attention.h.
#pragma once

#include "relu_linear_attention.h"
#include "relu_linear_attention_backward_kernels.cuh"

namespace efficientvit_kernels::cuda {

template <class T, Access kAccess>
ReluLinearAttentionKernels relu_linear_attention_half(int64_t head_dim) {
  return for_head_dim(head_dim, [](auto dim) -> ReluLinearAttentionKernels {
    constexpr int D = decltype(dim)::value;
    return {kv_state_kernel<T, D, kAccess>, apply_kernel<T, D, kAccess>, grad_state_kernel<T, D, kAccess>,
            grad_kv_kernel<T, D, kAccess>};
  });
}

template <class T>
ReluLinearAttentionKernels relu_linear_attention_half(int64_t head_dim, Access access) {
  switch (access) {
    case Access::kTokens:
      return relu_linear_attention_half<T, Access::kTokens>(head_dim);
    case Access::kChannels:
      return relu_linear_attention_half<T, Access::kChannels>(head_dim);
    default:
      return relu_linear_attention_half<T, Access::kElements>(head_dim);
  }
}

}  // namespace efficientvit_kernels::cuda
