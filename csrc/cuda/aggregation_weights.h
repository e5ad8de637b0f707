// The checked weights of an aggregation, contiguous, for the launchers of multiscale_aggregate and fused attention.
#pragma once

#include "aggregate_plan.h"
#include "runtime.h"

namespace efficientvit_kernels::cuda {

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

class AggregationWeights {
 public:
  AggregationWeights(const char* op, const Tensor& qkv, int64_t head_dim, const std::vector<Tensor>& depthwise_weights,
                     const std::vector<Tensor>& pointwise_weights, const std::vector<Tensor>& depthwise_biases,
                     const std::vector<Tensor>& pointwise_biases)
      : AggregationWeights(op, qkv, qkv.dim() == 4 ? qkv.size(1) : 0, head_dim, depthwise_weights, pointwise_weights,
                           depthwise_biases, pointwise_biases) {}

  // Of a qkv that is not there, with `channels`, of the dtype and on the GPU of `image`.
  AggregationWeights(const char* op, const Tensor& image, int64_t channels, int64_t head_dim,
                     const std::vector<Tensor>& depthwise_weights, const std::vector<Tensor>& pointwise_weights,
                     const std::vector<Tensor>& depthwise_biases, const std::vector<Tensor>& pointwise_biases) {
    EVK_CHECK(has_head_dim(head_dim), op, "head_dim", "8, 16, 32 or 64", head_dim);
    EVK_CHECK(on_device(image) && image.dim() == 4, op, "qkv", "a rank-4 GPU tensor", "another tensor");
    const ScalarType type = image.scalar_type();
    EVK_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, op, "qkv",
              "float16, bfloat16 or float32", "another dtype");
    EVK_CHECK(channels % (3 * head_dim) == 0, op, "qkv.shape[1]", "a multiple of 3 * head_dim", channels);
    EVK_CHECK(image.size(2) < INT32_MAX - 64 && image.size(3) < INT32_MAX - 64, op, "H and W", "less than 2^31 - 65",
              "more");
    const size_t scales = depthwise_weights.size();
    EVK_CHECK(pointwise_weights.size() == scales, op, "pointwise_weights", "as many as depthwise_weights",
              "another count");
    EVK_CHECK(depthwise_biases.empty() || depthwise_biases.size() == scales, op, "depthwise_biases",
              "none, or as many as depthwise_weights", "another count");
    EVK_CHECK(pointwise_biases.empty() || pointwise_biases.size() == scales, op, "pointwise_biases",
              "none, or as many as depthwise_weights", "another count");
    const auto checked = [&](const char* arg, const Tensor& weight) {
      EVK_CHECK(on_device(weight) && weight.get_device_index() == image.get_device_index(), op, arg, "on qkv's GPU",
                "on another device");
      EVK_CHECK(weight.scalar_type() == type, op, arg, "of qkv's dtype", "another dtype");
      EVK_CHECK(weight.dim() >= 1 && weight.size(0) == channels, op, arg, "of as many rows as qkv has channels",
                weight.dim() >= 1 ? weight.size(0) : 0);
      return as_contiguous(weight);
    };
    for (size_t s = 0; s < scales; ++s) {
      const Tensor &taps = depthwise_weights[s], &matrix = pointwise_weights[s];
      EVK_CHECK(taps.dim() == 4 && taps.size(1) == 1 && taps.size(2) == taps.size(3) && has_kernel_size(taps.size(2)),
                op, "depthwise_weights", "[channels, 1, k, k] with k = 3, 5 or 7", "another shape");
      EVK_CHECK(matrix.dim() == 4 && matrix.size(1) == head_dim && matrix.numel() == channels * head_dim, op,
                "pointwise_weights", "[channels, head_dim, 1, 1]", "another shape");
      depthwise.push_back(checked("depthwise_weights", taps));
      pointwise.push_back(checked("pointwise_weights", matrix));
    }
    for (const auto& [arg, given, own] : {std::tuple{"depthwise_biases", &depthwise_biases, &depthwise_bias},
                                          std::tuple{"pointwise_biases", &pointwise_biases, &pointwise_bias}}) {
      for (const Tensor& bias : *given) {
        EVK_CHECK(bias.numel() == channels, op, arg, "[channels]", "another shape");
        own->push_back(checked(arg, bias));
      }
    }
  }

  size_t scales() const { return depthwise.size(); }
  int size(size_t scale) const { return static_cast<int>(depthwise[scale].size(2)); }

  // Into the arguments of a launch for one scale.
  template <class Args>
  void set(Args& args, size_t scale) const {
    args.depthwise = depthwise[scale].const_data_ptr();
    args.pointwise = pointwise[scale].const_data_ptr();
    if (!depthwise_bias.empty()) args.depthwise_bias = depthwise_bias[scale].const_data_ptr();
    if (!pointwise_bias.empty()) args.pointwise_bias = pointwise_bias[scale].const_data_ptr();
  }

  std::vector<Tensor> depthwise, pointwise, depthwise_bias, pointwise_bias;
};

}  // namespace efficientvit_kernels::cuda
