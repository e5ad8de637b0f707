#include "relu_linear_attention.h"
#include "relu_linear_attention_fp32_kernels.cuh"

namespace efficientvit_kernels::cuda {

ReluLinearAttentionKernels relu_linear_attention_fp32(int64_t head_dim) {
  return for_head_dim(head_dim, [](auto dim) -> ReluLinearAttentionKernels {
    constexpr int D = decltype(dim)::value;
    return {kv_state_fp32_kernel<D>, apply_fp32_kernel<D>, grad_state_fp32_kernel<D>, grad_kv_fp32_kernel<D>};
  });
}

}  // namespace efficientvit_kernels::cuda
