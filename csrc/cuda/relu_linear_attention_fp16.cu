#include "relu_linear_attention_half.cuh"

namespace efficientvit_kernels::cuda {

ReluLinearAttentionKernels relu_linear_attention_fp16(int64_t head_dim, Access access) {
  return relu_linear_attention_half<__half>(head_dim, access);
}

}  // namespace efficientvit_kernels::cuda
