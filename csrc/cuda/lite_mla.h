// The kernels of lite_mla in two launches; see lite_mla_kernels.cuh.
#pragma once

#include "lite_mla_plan.h"

namespace efficientvit_kernels::cuda {

struct LiteMlaArgs;

struct LiteMlaKernels {
  using Kernel = void (*)(LiteMlaArgs);
  Kernel state, apply;
};

LiteMlaKernels lite_mla_fp16(int64_t head_dim, int64_t size);
LiteMlaKernels lite_mla_bf16(int64_t head_dim, int64_t size);

}  // namespace efficientvit_kernels::cuda
