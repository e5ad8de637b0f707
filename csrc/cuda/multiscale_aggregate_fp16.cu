#include "multiscale_aggregate_table.cuh"

namespace efficientvit_kernels::cuda {

AggregateKernels aggregate_fp16(int64_t head_dim, int64_t size) { return aggregate_kernels<__half>(head_dim, size); }

}  // namespace efficientvit_kernels::cuda
