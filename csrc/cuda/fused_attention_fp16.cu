#include "fused_attention_table.cuh"

namespace efficientvit_kernels::cuda {

FusedAttentionKernels fused_attention_fp16(int64_t head_dim, int64_t size) {
  return fused_attention_kernels<__half>(head_dim, size);
}

}  // namespace efficientvit_kernels::cuda
