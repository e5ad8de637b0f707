#include "multiscale_aggregate_table.cuh"

namespace efficientvit_kernels::cuda {

AggregateKernels aggregate_bf16(int64_t head_dim, int64_t size) {
  return aggregate_kernels<__nv_bfloat16>(head_dim, size);
}

}  // namespace efficientvit_kernels::cuda
