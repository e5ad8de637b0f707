// The checked arguments of a projection's epilogue: scale and shift of y's channels, and a residual.
#pragma once

#include "runtime.h"

namespace efficientvit_kernels::cuda {

using MaybeTensor = std::optional<Tensor>;

inline const float* vector_of(const char* op, const char* arg, const MaybeTensor& vector, const Tensor& y) {
  if (!vector.has_value()) return nullptr;
  EVK_CHECK(on_device(*vector) && vector->scalar_type() == ScalarType::Float && vector->is_contiguous() &&
                vector->numel() == y.size(1),
            op, arg, "contiguous float32 of y's channels, on its GPU", "another tensor");
  return static_cast<const float*>(vector->const_data_ptr());
}

// `alike` becomes false where the residual has other strides than y.
inline Image residual_of(const char* op, const MaybeTensor& residual, const Tensor& y, bool& alike) {
  if (!residual.has_value()) return {};
  EVK_CHECK(on_device(*residual) && residual->scalar_type() == y.scalar_type() && residual->dim() == 4, op, "residual",
            "a rank-4 GPU tensor of y's dtype", "another tensor");
  for (int64_t axis = 0; axis < 4; ++axis) {
    EVK_CHECK(residual->size(axis) == y.size(axis), op, "residual", "of y's shape", "another shape");
    alike &= y.size(axis) == 1 || residual->stride(axis) == y.stride(axis);
  }
  return image_of(*residual);
}

}  // namespace efficientvit_kernels::cuda
