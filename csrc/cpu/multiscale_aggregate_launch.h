// The multi-scale aggregation for other launchers: one class that holds the checked weights.
#pragma once

#include <vector>

#include "launch.h"
#include "multiscale_aggregate.h"

namespace efficientvit_kernels::cpu {

// Weights and biases of all scales, dense. The gradients below are those of the whole batch.
class Aggregation {
 public:
  // Checks the weights against [B, channels, H, W] images of dtype `like`.
  Aggregation(const char* op, const Tensor& like, int64_t channels, int64_t head_dim,
              const std::vector<Tensor>& depthwise_weights, const std::vector<Tensor>& pointwise_weights,
              const std::vector<Tensor>& depthwise_biases, const std::vector<Tensor>& pointwise_biases);

  int64_t num_scales() const { return static_cast<int64_t>(scales_.size()); }
  const std::vector<AggregateScale>& scales() const { return scales_; }

  // One [B, 3T, H, W] tensor per scale, in the memory format of qkv.
  std::vector<Tensor> forward(const Tensor& qkv) const;

  struct Grads {
    std::vector<Tensor> depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases;  // if wanted
  };
  // grad_qkv: null if unwanted. With `accumulate` it holds a gradient already, which the result is added to.
  Grads backward(const std::vector<Tensor>& grad_outs, const Tensor& qkv, const Tensor* grad_qkv, bool accumulate,
                 bool needs_weights, bool needs_biases) const;

 private:
  MultiscaleAggregateArgs args_for(const Tensor& qkv, const std::vector<AggregateScale>& scales) const;

  std::vector<Tensor> depthwise_, pointwise_, depthwise_bias_, pointwise_bias_;
  std::vector<AggregateScale> scales_;
  std::vector<Buffer> prepared_;
  int64_t head_dim_, parts_;
  StorageType type_;
  MultiscaleAggregateKernels kernels_;
};

}  // namespace efficientvit_kernels::cpu
