// 1 x 1 convolution and its weight gradient on the CPU: what the launcher hands to the kernels of one instruction set.
//
//   out[b, m, n] = (sum_k weight[m, k] in_scale[k] in[b, k, n]) * scale[m] + shift[m] + residual[b, m, n]
//   grad_weight[m, k] = sum_{b, n} grad_out[b, m, n] in[b, k, n]
#pragma once

#include <cstdint>

#include "image.h"
#include "isa.h"
#include "plan.h"

namespace efficientvit_kernels::cpu {

struct PointwiseArgs {
  const void* weight;  // [M, K], storage type
  int64_t stride_m, stride_k;
  ImageTensor in, out, residual;  // out and residual: NCHW or channels_last, both the same; residual.data may be null
  const void *in_scale, *scale, *shift;  // compute type, or null
  int64_t out_channels, in_channels, height, width;
};

// The rows of a weight from some panel on: packed panels, or, with a stride in elements, the rows themselves.
struct WeightRows {
  void* data;
  int64_t stride;
};

// Row panels [p0, p1) of the weight; column panels [q0, q1) of image b; and where they lie.
struct PointwiseTask {
  int64_t b, p0, p1, q0, q1;
  WeightRows rows;
  void* packed_cols;
};

// One chunk of tokens of one image, for the weight gradient.
struct PointwiseGradArgs {
  ImageTensor grad_out, in;
  int64_t out_channels, in_channels, height, width;
  int64_t b, n0, count;
  void *packed_grad, *packed_in;  // packed_rows_numel(M, count), packed_cols_numel(K, count)
  void* grad_weight;              // [M, K rounded up to whole panels], compute type; accumulated
  bool first;                     // overwrites grad_weight
};

struct PointwiseKernels {
  void (*pack_rows)(const PointwiseArgs&, const PointwiseTask&);
  void (*pack_cols)(const PointwiseArgs&, const PointwiseTask&, void* scratch);
  void (*multiply)(const PointwiseArgs&, const PointwiseTask&, void* scratch);
  int64_t (*scratch_bytes)(int64_t cols, int64_t row_panels);  // for pack_cols and multiply
  void (*pack_grad)(const PointwiseGradArgs&, int64_t p0, int64_t p1);
  void (*pack_in)(const PointwiseGradArgs&, int64_t q0, int64_t q1, void* scratch);
  void (*accumulate)(const PointwiseGradArgs&, int64_t p0, int64_t p1);
  // out[i] = values[i] * factor, rounded once to the storage type.
  void (*round)(const void* values, int64_t count, double factor, void* out);
  int64_t (*packed_rows_numel)(int64_t m, int64_t depth);
  int64_t (*packed_cols_numel)(int64_t n, int64_t depth);
  int64_t panel_rows, panel_cols, scratch_numel;  // scratch_numel: of pack_in
};

EVK_DECLARE_KERNELS(PointwiseKernels, pointwise_kernels)

}  // namespace efficientvit_kernels::cpu
