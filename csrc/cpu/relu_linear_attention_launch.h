// ReLU linear attention for other launchers; shapes as in relu_linear_attention.h.
#pragma once

#include <tuple>
#include <vector>

#include "launch.h"
#include "relu_linear_attention.h"

namespace efficientvit_kernels::cpu {

// Output and state.
std::tuple<Tensor, Tensor> attention_forward(const std::vector<Tensor>& qkv, int64_t head_dim, double eps);

// The output for a state that is there already: NCHW, in the compute type.
Tensor attention_apply(const std::vector<Tensor>& qkv, const Tensor& state, int64_t head_dim, double eps);

// Gradients of the tensors in qkv that `scales` names.
std::vector<Tensor> attention_backward(const Tensor& grad_out, const std::vector<Tensor>& qkv, const Tensor& state,
                                       int64_t head_dim, double eps, const std::vector<int64_t>& scales);

}  // namespace efficientvit_kernels::cpu
