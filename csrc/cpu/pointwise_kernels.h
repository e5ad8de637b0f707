// 1 x 1 convolution for one instruction set, on the packed product of gemm.h.
#pragma once

#include "gemm.h"
#include "pointwise.h"

namespace efficientvit_kernels::cpu::EVK_ISA {

template <class S>
static void pointwise_pack_rows_kernel(const PointwiseArgs& args, const PointwiseTask& task) {
  using T = Compute<S>;
  pack_rows(static_cast<const S*>(args.weight), args.stride_m, args.stride_k, args.out_channels, args.in_channels,
            task.p0, task.p1, static_cast<const T*>(args.in_scale), static_cast<T*>(task.rows.data));
}

// The tokens of a task's column panels, as a run: one "row" of an image that is one row high.
template <class T>
static Region tokens_of_panels(const PointwiseArgs& args, const PointwiseTask& task) {
  const int64_t tokens = args.height * args.width, end = task.q1 * kPanelCols<T>;
  return {0, 1, task.q0 * kPanelCols<T>, end < tokens ? end : tokens};
}

template <class S>
static void pointwise_pack_cols_kernel(const PointwiseArgs& args, const PointwiseTask& task, void* scratch) {
  using T = Compute<S>;
  const Region run = tokens_of_panels<T>(args, task);
  pack_cols(tokens_of<const S>(args.in, args.height, args.width, task.b, 0), args.in_channels, run.c0, run.cols(),
            static_cast<T*>(task.packed_cols), static_cast<T*>(scratch));
}

template <class S>
static int64_t pointwise_scratch_bytes(int64_t cols, int64_t row_panels) {
  using T = Compute<S>;
  return at_least(pack_cols_scratch<T>(), ImageWriter<S>::scratch_numel(row_panels * kPanelRows, cols)) *
         static_cast<int64_t>(sizeof(T));
}

template <class S>
static void pointwise_kernel(const PointwiseArgs& args, const PointwiseTask& task, void* scratch) {
  using T = Compute<S>;
  const int64_t M = args.out_channels, H = args.height, W = args.width;
  const Region run = tokens_of_panels<T>(args, task);
  Tokens<const S> residual{nullptr, 0, 0, 0, 0};
  if (args.residual.data) residual = tokens_of<const S>(args.residual, H, W, task.b, 0);
  const Epilogue<S> epilogue{static_cast<const T*>(args.scale), static_cast<const T*>(args.shift), residual};
  const ImageWriter<S> writer(tokens_of<S>(args.out, H, W, task.b, 0), epilogue, run, H * W, first_row(M, task.p0),
                              first_row(M, task.p1), static_cast<T*>(scratch));
  multiply<T>(task.rows, M, task.p0, task.p1, args.in_channels, static_cast<const T*>(task.packed_cols), run.cols(),
              writer);
  writer.finish();
}

// --- weight gradient ------------------------------------------------------------------------------------------------

template <class S>
static void pointwise_pack_grad_kernel(const PointwiseGradArgs& args, int64_t p0, int64_t p1) {
  using T = Compute<S>;
  const ImageTensor& g = args.grad_out;
  pack_rows<S, T>(static_cast<const S*>(g.data) + args.b * g.stride_b + args.n0 * g.stride_w, g.stride_c, g.stride_w,
                  args.out_channels, args.count, p0, p1, nullptr,
                  static_cast<T*>(args.packed_grad) + p0 * panel_depth(args.count) * kPanelLd);
}

// Column panels of `in`, transposed: its tokens are the rows of B, its channels the columns.
template <class S>
static void pointwise_pack_in_kernel(const PointwiseGradArgs& args, int64_t q0, int64_t q1, void* scratch) {
  using T = Compute<S>;
  const ImageTensor& x = args.in;
  const Tokens<const S> swapped{static_cast<const S*>(x.data) + args.b * x.stride_b + args.n0 * x.stride_w, x.stride_w,
                                0, x.stride_c, args.in_channels};
  const int64_t c0 = q0 * kPanelCols<T>;
  const int64_t c1 = q1 * kPanelCols<T> < args.in_channels ? q1 * kPanelCols<T> : args.in_channels;
  pack_cols(swapped, args.count, c0, c1 - c0, static_cast<T*>(args.packed_in) + c0 * panel_depth(args.count),
            static_cast<T*>(scratch));
}

template <class S>
static void pointwise_accumulate_kernel(const PointwiseGradArgs& args, int64_t p0, int64_t p1) {
  using T = Compute<S>;
  const int64_t ld = col_panels<T>(args.in_channels) * kPanelCols<T>;
  T* grad = static_cast<T*>(args.grad_weight);
  const T* rows_packed = static_cast<const T*>(args.packed_grad) + p0 * panel_depth(args.count) * kPanelLd;
  const T* cols_packed = static_cast<const T*>(args.packed_in);
  const int64_t depth = panel_depth(args.count);
  for (int64_t k = 0; k < args.count; k += kChain) {
    const int64_t chain = args.count - k < kChain ? args.count - k : kChain;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t i0 = first_row(args.out_channels, p), rows = first_row(args.out_channels, p + 1) - i0;
      const T* a = rows_packed + ((p - p0) * depth + k) * kPanelLd;
      for (int64_t n = 0; n < ld; n += kPanelCols<T>) {
        const T* b = cols_packed + n * depth + k * kPanelCols<T>;
        T* out = grad + i0 * ld + n;
        if (args.first && k == 0) {
          multiply_panels<T, false>(rows, kPanelCols<T>, chain, a, b, out, ld);
        } else {
          multiply_panels<T, true>(rows, kPanelCols<T>, chain, a, b, out, ld);
        }
      }
    }
  }
}

template <class S>
static void pointwise_round_kernel(const void* values, int64_t count, double factor, void* out) {
  using T = Compute<S>;
  const Vec<T> f = broadcast(static_cast<T>(factor));
  const T* from = static_cast<const T*>(values);
  S* to = static_cast<S*>(out);
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store_compute(to + i, load(from + i) * f);
  if (i < count) store_compute(to + i, load_compute(from + i, count - i) * f, count - i);
}

// --- table ----------------------------------------------------------------------------------------------------------

template <class S>
static PointwiseKernels pointwise_kernels_for() {
  using T = Compute<S>;
  return {pointwise_pack_rows_kernel<S>,
          pointwise_pack_cols_kernel<S>,
          pointwise_kernel<S>,
          pointwise_scratch_bytes<S>,
          pointwise_pack_grad_kernel<S>,
          pointwise_pack_in_kernel<S>,
          pointwise_accumulate_kernel<S>,
          pointwise_round_kernel<S>,
          packed_rows_numel,
          packed_cols_numel<T>,
          kPanelRows,
          kPanelCols<T>,
          pack_cols_scratch<T>()};
}

PointwiseKernels pointwise_kernels(StorageType type) {
  switch (type) {
    case StorageType::kDouble:
      return pointwise_kernels_for<double>();
    case StorageType::kHalf:
      return pointwise_kernels_for<Half>();
    case StorageType::kBFloat16:
      return pointwise_kernels_for<BFloat16>();
    default:
      return pointwise_kernels_for<float>();
  }
}

}  // namespace efficientvit_kernels::cpu::EVK_ISA
