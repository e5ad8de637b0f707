// The kernels between the products of lite_mla; see aggregate_attention_state_kernels.cuh.
#pragma once

#include "aggregate_plan.h"

namespace efficientvit_kernels::cuda {

struct AggregateAttentionArgs;

struct AggregateAttentionKernels {
  using Kernel = void (*)(AggregateAttentionArgs);
  Kernel state, apply;
};

AggregateAttentionKernels aggregate_attention_fp16(int64_t head_dim, int64_t size);
AggregateAttentionKernels aggregate_attention_bf16(int64_t head_dim, int64_t size);

}  // namespace efficientvit_kernels::cuda
