#include "multiscale_aggregate_table.cuh"

namespace efficientvit_kernels::cuda {

AggregateKernels aggregate_fp32(int64_t head_dim, int64_t size) { return aggregate_kernels<float>(head_dim, size); }

}  // namespace efficientvit_kernels::cuda
