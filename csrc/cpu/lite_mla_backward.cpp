// Launcher and registration of lite_mla's backward on the CPU: gradients of the projection, the attention, the
// aggregation and the qkv product, from x and qkv, or from x alone.
#include <torch/csrc/stable/library.h>

#include "lite_mla_launch.h"
#include "relu_linear_attention_launch.h"

namespace efficientvit_kernels::cpu {
namespace {

// out[m, k] = factors[m] * grad[m, k], rounded once.
template <class T>
void store_weight_grad(const WeightGrad& grad, const Tensor& out, const T* factors) {
  if (grad.values == data_of(out) && factors == nullptr) return;
  const PointwiseKernels kernels = pointwise_kernels_in_use(storage_type(out, "lite_mla_bwd", "weight"));
  const int64_t rows = out.size(0), cols = out.size(1), row_bytes = cols * out.element_size();
  torch::stable::parallel_for(0, rows, grain_size(8 * cols), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      kernels.round(static_cast<const T*>(grad.values) + m * grad.ld, cols, factors ? factors[m] : T(1),
                    static_cast<char*>(data_of(out)) + m * row_bytes);
    }
  });
}

Tensor weight_grad(const Tensor& grad_out, const Tensor& in, const Tensor& weight) {
  const Tensor out = empty_like_weight(weight);
  const WeightGrad grad = pointwise_weight_grad(grad_out, in, out);
  compute_bytes(in) == 8 ? store_weight_grad<double>(grad, out, nullptr) : store_weight_grad<float>(grad, out, nullptr);
  return out;
}

Tensor rounded_vector(const std::vector<double>& values, const Tensor& like, ScalarType type) {
  const int64_t sizes[] = {static_cast<int64_t>(values.size())};
  Tensor out = torch::stable::empty(sizes, type, std::nullopt, like.device());
  store_rounded(values.data(), sizes[0], storage_type(out, "lite_mla_bwd", "vector"), data_of(out), 0);
  return out;
}

struct ProjectionGrads {
  Tensor weight;
  MaybeTensor scale;
};

// y = scale * (W att): the gradient of scale comes from that of scale * W, so W att is not needed again.
template <class T>
ProjectionGrads projection_grads(const Tensor& grad_y, const Tensor& att, const Tensor& proj_weight,
                                 const MaybeTensor& scale) {
  ProjectionGrads result{empty_like_weight(proj_weight), std::nullopt};
  const WeightGrad grad = pointwise_weight_grad(grad_y, att, result.weight);
  if (!scale) {
    store_weight_grad<T>(grad, result.weight, nullptr);
    return result;
  }
  const Tensor weight = as_type(proj_weight, compute_type(att));
  const T* w = static_cast<const T*>(weight.const_data_ptr());
  std::vector<double> sums(proj_weight.size(0), 0.0);
  const int64_t rows = proj_weight.size(0), cols = proj_weight.size(1);
  torch::stable::parallel_for(0, rows, grain_size(4 * cols), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const T* from = static_cast<const T*>(grad.values) + m * grad.ld;
      for (int64_t k = 0; k < cols; ++k) sums[m] += static_cast<double>(w[m * cols + k]) * from[k];
    }
  });
  result.scale = rounded_vector(sums, att, compute_type(att));
  store_weight_grad<T>(grad, result.weight, static_cast<const T*>(scale->const_data_ptr()));
  return result;
}

Tensors lite_mla_bwd_cpu(Tensor grad_y, Tensor x, MaybeTensor qkv, MaybeTensor state, Tensor qkv_weight,
                         Tensors depthwise_weights, Tensors pointwise_weights, Tensor proj_weight, MaybeTensor qkv_bias,
                         Tensors depthwise_biases, Tensors pointwise_biases, MaybeTensor proj_scale, bool has_shift,
                         int64_t head_dim, double eps, bool needs_x, bool needs_weights) {
  const char* op = "lite_mla_bwd";
  count_call();
  const Block block(op, x, qkv_weight, depthwise_weights, pointwise_weights, proj_weight, qkv_bias, depthwise_biases,
                    pointwise_biases, head_dim, eps);
  EVK_CHECK(grad_y.is_cpu() && grad_y.scalar_type() == x.scalar_type() && grad_y.dim() == 4 &&
                grad_y.size(0) == x.size(0) && grad_y.size(1) == proj_weight.size(0) && grad_y.size(2) == x.size(2) &&
                grad_y.size(3) == x.size(3),
            op, "grad_y", "[B, C_out, H, W] of x's dtype", "another tensor");
  const Tensor x_dense = dense(x), dy = dense(grad_y);
  if (!qkv.has_value()) qkv = block.qkv(x_dense);
  EVK_CHECK(qkv->is_contiguous() && qkv->scalar_type() == x.scalar_type() && qkv->size(1) == block.channels &&
                qkv->numel() == block.channels * x.size(0) * x.size(2) * x.size(3),
            op, "qkv", "that of the forward", "another tensor");
  if (!state.has_value()) {
    state = block.empty_state(x, x.size(0));
    if (qkv->numel() > 0) Attend(block, *qkv, *state).state_only();
  }
  MaybeTensor scale;
  PointwiseEpilogue through_scale;
  if (proj_scale.has_value()) {
    scale = compute_vector(op, "proj_scale", proj_scale, x, proj_weight.size(0));
    through_scale.in_scale = data_of(*scale);
  }

  Tensors multi_scale = block.aggregation.forward(*qkv);
  multi_scale.insert(multi_scale.begin(), *qkv);
  ProjectionGrads projection;
  if (needs_weights) {
    const Tensor att = attention_apply(multi_scale, *state, head_dim, eps);
    projection = compute_bytes(x) == 8 ? projection_grads<double>(dy, att, proj_weight, scale)
                                       : projection_grads<float>(dy, att, proj_weight, scale);
  }
  Tensors grads;
  {
    const Tensor grad_att = empty_image(x, proj_weight.size(1), MemoryFormat::Contiguous);
    pointwise(dy, block.proj_weight.transposed(), through_scale, grad_att, Stage::kInputGrad);
    std::vector<int64_t> scales;
    for (size_t s = 0; s < multi_scale.size(); ++s) scales.push_back(static_cast<int64_t>(s));
    grads = attention_backward(grad_att, multi_scale, *state, head_dim, eps, scales);
  }
  multi_scale.clear();
  const Tensor grad_qkv = grads[0];
  grads.erase(grads.begin());
  const bool needs_biases = needs_weights && (!depthwise_biases.empty() || !pointwise_biases.empty());
  const Aggregation::Grads aggregation =
      block.aggregation.backward(grads, *qkv, &grad_qkv, true, needs_weights, needs_biases);
  grads.clear();

  Tensors results;
  if (needs_x) {
    results.push_back(empty_image(x, x.size(1), format_like(x)));
    pointwise(grad_qkv, block.qkv_weight.transposed(), {}, results.back(), Stage::kInputGrad);
  }
  if (!needs_weights) return results;
  auto append = [&](const Tensors& list) { results.insert(results.end(), list.begin(), list.end()); };
  results.push_back(weight_grad(grad_qkv, x_dense, qkv_weight));
  append(aggregation.depthwise_weights);
  append(aggregation.pointwise_weights);
  results.push_back(projection.weight);
  if (qkv_bias.has_value()) results.push_back(rounded_vector(channel_sums(grad_qkv), x, x.scalar_type()));
  if (!depthwise_biases.empty()) append(aggregation.depthwise_biases);
  if (!pointwise_biases.empty()) append(aggregation.pointwise_biases);
  if (scale) results.push_back(*projection.scale);
  if (has_shift) results.push_back(rounded_vector(channel_sums(dy), x, compute_type(x)));
  return results;
}

}  // namespace
}  // namespace efficientvit_kernels::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(efficientvit_kernels, m) {
  m.def(
      "lite_mla_bwd(Tensor grad_y, Tensor x, Tensor? qkv, Tensor? state, Tensor qkv_weight, "
      "Tensor[] depthwise_weights, Tensor[] pointwise_weights, Tensor proj_weight, Tensor? qkv_bias, "
      "Tensor[] depthwise_biases, Tensor[] pointwise_biases, Tensor? proj_scale, bool has_shift, int head_dim, "
      "float eps, bool needs_x, bool needs_weights) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(efficientvit_kernels, CPU, m) {
  m.impl("lite_mla_bwd", TORCH_BOX(&efficientvit_kernels::cpu::lite_mla_bwd_cpu));
}
