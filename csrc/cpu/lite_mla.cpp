// Launcher and registration of lite_mla's forward on the CPU: product, aggregation and attention, projection.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "lite_mla_launch.h"

namespace efficientvit_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor> lite_mla_fwd_cpu(Tensor x, Tensor qkv_weight, Tensors depthwise_weights,
                                                    Tensors pointwise_weights, Tensor proj_weight, MaybeTensor qkv_bias,
                                                    Tensors depthwise_biases, Tensors pointwise_biases,
                                                    MaybeTensor proj_scale, MaybeTensor proj_shift,
                                                    MaybeTensor residual, int64_t head_dim, double eps, bool save) {
  const char* op = "lite_mla";
  count_call();
  const Block block(op, x, qkv_weight, depthwise_weights, pointwise_weights, proj_weight, qkv_bias, depthwise_biases,
                    pointwise_biases, head_dim, eps);
  const int64_t out_channels = proj_weight.size(0);
  MaybeTensor scale, shift;
  PointwiseEpilogue epilogue;
  if (proj_scale.has_value()) {
    scale = compute_vector(op, "proj_scale", proj_scale, x, out_channels);
    epilogue.scale = data_of(*scale);
  }
  if (proj_shift.has_value()) {
    shift = compute_vector(op, "proj_shift", proj_shift, x, out_channels);
    epilogue.shift = data_of(*shift);
  }
  Tensor y = empty_image(x, out_channels, format_like(x));
  if (residual.has_value()) {
    EVK_CHECK(residual->is_cpu() && residual->scalar_type() == x.scalar_type() && residual->dim() == 4, op, "residual",
              "a rank-4 CPU tensor of x's dtype", "another tensor");
    bool same_strides = true;
    for (int64_t axis = 0; axis < 4; ++axis) {
      EVK_CHECK(residual->size(axis) == y.size(axis), op, "residual", "[B, C_out, H, W]", "another shape");
      same_strides &= residual->size(axis) == 1 || residual->stride(axis) == y.stride(axis);
    }
    if (!same_strides) {
      Tensor copy = empty_image(x, out_channels, format_like(x));
      torch::stable::copy_(copy, *residual);
      residual = copy;
    }
    epilogue.residual = &*residual;
  }
  const int64_t none[] = {0};
  Tensor qkv = block.qkv(dense(x));
  Tensor state = block.empty_state(x, x.size(0));
  if (qkv.numel() == 0) {
    torch::stable::zero_(state);
  } else {
    Attend(block, qkv, state).project(block.proj_weight, epilogue, y);
  }
  if (save) return {y, qkv, state};
  return {y, torch::stable::empty(none, x.scalar_type(), std::nullopt, x.device()),
          torch::stable::empty(none, compute_type(x), std::nullopt, x.device())};
}

}  // namespace
}  // namespace efficientvit_kernels::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(efficientvit_kernels, m) {
  m.def(
      "lite_mla_fwd(Tensor x, Tensor qkv_weight, Tensor[] depthwise_weights, Tensor[] pointwise_weights, "
      "Tensor proj_weight, Tensor? qkv_bias, Tensor[] depthwise_biases, Tensor[] pointwise_biases, Tensor? proj_scale, "
      "Tensor? proj_shift, Tensor? residual, int head_dim, float eps, bool save) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efficientvit_kernels, CPU, m) {
  m.impl("lite_mla_fwd", TORCH_BOX(&efficientvit_kernels::cpu::lite_mla_fwd_cpu));
}
