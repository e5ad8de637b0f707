// The kernels between the products of lite_mla; see fused_attention_kernels.cuh.
#pragma once

#include "aggregate_plan.h"

namespace efficientvit_kernels::cuda {

struct FusedAttentionArgs;

struct FusedAttentionKernels {
  using Kernel = void (*)(FusedAttentionArgs);
  Kernel state, apply;
};

FusedAttentionKernels fused_attention_fp16(int64_t head_dim, int64_t size);
FusedAttentionKernels fused_attention_bf16(int64_t head_dim, int64_t size);

}  // namespace efficientvit_kernels::cuda
