// The kernels of relu_linear_attention, one table per storage type: each is compiled in a file of its own, in parallel.
#pragma once

#include "tile.cuh"

namespace efficientvit_kernels::cuda {

struct ReluLinearAttentionArgs;

struct ReluLinearAttentionKernels {
  using Kernel = void (*)(ReluLinearAttentionArgs);
  Kernel kv_state, apply, grad_state, grad_kv;
};

ReluLinearAttentionKernels relu_linear_attention_fp16(int64_t head_dim, Access access);
ReluLinearAttentionKernels relu_linear_attention_bf16(int64_t head_dim, Access access);
ReluLinearAttentionKernels relu_linear_attention_fp32(int64_t head_dim);

}  // namespace efficientvit_kernels::cuda
