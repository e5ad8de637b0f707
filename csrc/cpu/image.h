// Images as the kernels see them: a pointer, strides, and the type of the stored values.
#pragma once

#include <cstdint>

namespace efficientvit_kernels::cpu {

enum class StorageType { kFloat, kDouble, kHalf, kBFloat16 };
inline constexpr int kStorageTypes = 4;

// A [B, channels, H, W] tensor. Strides in elements.
struct ImageTensor {
  void* data;
  int64_t stride_b, stride_c, stride_h, stride_w;
};

}  // namespace efficientvit_kernels::cpu
