// The kernels of multiscale_aggregate, one table per storage type: each is compiled in a file of its own, in parallel.
#pragma once

#include "aggregate_plan.h"

namespace efficientvit_kernels::cuda {

struct AggregateArgs;

struct AggregateKernels {
  using Kernel = void (*)(AggregateArgs);
  Kernel forward, gradients;
};

AggregateKernels aggregate_fp16(int64_t head_dim, int64_t size);
AggregateKernels aggregate_bf16(int64_t head_dim, int64_t size);
AggregateKernels aggregate_fp32(int64_t head_dim, int64_t size);

}  // namespace efficientvit_kernels::cuda
