#include "lite_mla_table.cuh"

namespace efficientvit_kernels::cuda {

LiteMlaKernels lite_mla_bf16(int64_t head_dim, int64_t size) { return lite_mla_kernels<__nv_bfloat16>(head_dim, size); }

}  // namespace efficientvit_kernels::cuda
