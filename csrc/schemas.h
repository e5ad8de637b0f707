// The registered ops: one text for every library that defines them.
#pragma once

#define EVK_RELU_LINEAR_ATTENTION_FWD \
  "relu_linear_attention_fwd(Tensor[] qkv, int head_dim, float eps) -> (Tensor, Tensor)"
#define EVK_RELU_LINEAR_ATTENTION_BWD                                                                              \
  "relu_linear_attention_bwd(Tensor grad_out, Tensor[] qkv, Tensor state, int head_dim, float eps, int[] scales) " \
  "-> Tensor[]"
