// 1 x 1 convolutions for other launchers.
#pragma once

#include "launch.h"
#include "pointwise.h"

namespace efficientvit_kernels::cpu {

// Whether the image is NCHW or channels_last without gaps.
bool is_dense(const Tensor& image);

// The image itself if it is dense, else a contiguous copy.
Tensor dense(const Tensor& image);

struct PointwiseWeight {
  const void* data;  // [M, K], storage type
  int64_t out_channels, in_channels, stride_m, stride_k;

  // [M, K, 1, 1], and its transpose
  static PointwiseWeight of(const Tensor& weight) {
    return {data_of(weight), weight.size(0), weight.size(1), weight.stride(0), weight.stride(1)};
  }
  PointwiseWeight transposed() const { return {data, in_channels, out_channels, stride_k, stride_m}; }
};

struct PointwiseEpilogue {
  const void *in_scale = nullptr, *scale = nullptr, *shift = nullptr;  // compute type, or null
  const Tensor* residual = nullptr;                                    // dense, of out's memory format
};

// Row panels of the weight, packed by all threads.
Buffer pack_weight(const PointwiseWeight& weight, StorageType type, const void* in_scale);

// out = weight . in, see pointwise.h. `in` and `out` are dense.
void pointwise(const Tensor& in, const PointwiseWeight& weight, const PointwiseEpilogue& epilogue, const Tensor& out);

// sum_{b, n} grad_out[b, m, n] in[b, k, n] for dense images, [M, ld] in the compute type; ld >= K.
struct WeightGrad {
  Buffer data;
  int64_t ld;
};
WeightGrad pointwise_weight_grad(const Tensor& grad_out, const Tensor& in);

// sum_{b, n} image[b, c, n], dense image.
std::vector<double> channel_sums(const Tensor& image);

}  // namespace efficientvit_kernels::cpu
