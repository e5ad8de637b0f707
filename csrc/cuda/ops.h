// The ops' launchers, for those that are composed of others.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

namespace efficientvit_kernels::cuda {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

std::tuple<Tensor, Tensor> relu_linear_attention_fwd(Tensors qkv, int64_t head_dim, double eps);

Tensors multiscale_aggregate_fwd(Tensor qkv, Tensors depthwise_weights, Tensors pointwise_weights,
                                 Tensors depthwise_biases, Tensors pointwise_biases, int64_t head_dim);

}  // namespace efficientvit_kernels::cuda
