// The registered ops: one text for every library that defines them.
#pragma once

#define EVK_RELU_LINEAR_ATTENTION_FWD \
  "relu_linear_attention_fwd(Tensor[] qkv, int head_dim, float eps) -> (Tensor, Tensor)"
#define EVK_RELU_LINEAR_ATTENTION_BWD                                                                              \
  "relu_linear_attention_bwd(Tensor grad_out, Tensor[] qkv, Tensor state, int head_dim, float eps, int[] scales) " \
  "-> Tensor[]"
#define EVK_MULTISCALE_AGGREGATE_FWD                                                              \
  "multiscale_aggregate_fwd(Tensor qkv, Tensor[] depthwise_weights, Tensor[] pointwise_weights, " \
  "Tensor[] depthwise_biases, Tensor[] pointwise_biases, int head_dim) -> Tensor[]"
#define EVK_MULTISCALE_AGGREGATE_BWD                                                                          \
  "multiscale_aggregate_bwd(Tensor[] grad_outs, Tensor qkv, Tensor[] depthwise_weights, "                     \
  "Tensor[] pointwise_weights, Tensor[] depthwise_biases, int head_dim, bool needs_qkv, bool needs_weights, " \
  "bool needs_biases) -> Tensor[]"
// Parts of lite_mla on CUDA, for the library's own use.
#define EVK_MULTISCALE_AGGREGATE_BWD_ADD                                                                         \
  "multiscale_aggregate_bwd_add(Tensor[] grad_outs, Tensor qkv, Tensor[] depthwise_weights, "                    \
  "Tensor[] pointwise_weights, Tensor[] depthwise_biases, int head_dim, bool needs_weights, bool needs_biases, " \
  "Tensor(a!) grad_qkv) -> Tensor[]"
#define EVK_AGGREGATE_ATTENTION_FWD                                                                                 \
  "aggregate_attention_fwd(Tensor qkv, Tensor[] depthwise_weights, Tensor[] pointwise_weights, "                    \
  "Tensor[] depthwise_biases, Tensor[] pointwise_biases, int head_dim, float eps, bool channels_last) -> (Tensor, " \
  "Tensor)"
// [y], or nothing where the launch plan has another variant and `always` is not set.
#define EVK_LITE_MLA_TWO_LAUNCHES                                                                                    \
  "lite_mla_two_launches(Tensor x, Tensor qkv_weight, Tensor[] depthwise_weights, Tensor[] pointwise_weights, "      \
  "Tensor proj_weight, Tensor? qkv_bias, Tensor[] depthwise_biases, Tensor[] pointwise_biases, Tensor? proj_scale, " \
  "Tensor? proj_shift, Tensor? residual, int head_dim, float eps, bool always) -> Tensor[]"
#define EVK_PROJECTION_EPILOGUE \
  "projection_epilogue(Tensor(a!) y, Tensor? scale, Tensor? shift, Tensor? residual) -> ()"
#define EVK_PROJECTION \
  "projection(Tensor weight, Tensor x, Tensor? scale, Tensor? shift, Tensor? residual, Tensor(a!) y) -> ()"
