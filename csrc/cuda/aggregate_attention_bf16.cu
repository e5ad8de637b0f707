#include "aggregate_attention_table.cuh"

namespace efficientvit_kernels::cuda {

AggregateAttentionKernels aggregate_attention_bf16(int64_t head_dim, int64_t size) {
  return aggregate_attention_kernels<__nv_bfloat16>(head_dim, size);
}

}  // namespace efficientvit_kernels::cuda
