#include "fused_attention_table.cuh"

namespace efficientvit_kernels::cuda {

FusedAttentionKernels fused_attention_bf16(int64_t head_dim, int64_t size) {
  return fused_attention_kernels<__nv_bfloat16>(head_dim, size);
}

}  // namespace efficientvit_kernels::cuda
