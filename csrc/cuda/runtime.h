// What launchers ask of CUDA and of torch: the device, the stream, views of tensors. In the emulator's builds the same
// code runs kernels on CPU tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "../checks.h"
#include "launch_plan.h"
#include "tile.cuh"

#if defined(__CUDACC__)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace efficientvit_kernels::cuda {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One more call of a registered op; `native_calls` in testing.py reads the sum.
void count_call();

// Makes a tensor's device the current one for as long as it lives, and launches on torch's current stream there.
class Launcher {
 public:
  explicit Launcher(const Tensor& t);
  const Device& device() const { return device_; }

  // One dimension of blocks. The kernel's shared memory is what the plan says, no more than the device has.
  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, Args... args) const {
    const auto grid = static_cast<unsigned>(blocks), block = static_cast<unsigned>(threads);
#if defined(__CUDACC__)
    if (shared_bytes > 48 * 1024) {  // more than every GPU grants without being asked
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    }
    kernel<<<grid, block, shared_bytes, stream_>>>(args...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
#else
    emulator::launch(kernel, dim3(grid), dim3(block), static_cast<size_t>(shared_bytes), args...);
#endif
  }

 private:
#if defined(__CUDACC__)
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
  Device device_;
};

inline bool on_device(const Tensor& t) {
#if defined(__CUDACC__)
  return t.is_cuda();
#else
  return t.is_cpu();
#endif
}

inline MemoryFormat format_like(const Tensor& t) {
  return t.stride(1) == 1 && !t.is_contiguous() ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

inline Tensor empty_image(const Tensor& like, int64_t channels, MemoryFormat format) {
  const int64_t sizes[] = {like.size(0), channels, like.size(2), like.size(3)};
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor empty_image(const Tensor& like, int64_t channels) {
  return empty_image(like, channels, format_like(like));
}

inline Tensor empty_floats(const Tensor& like, const std::vector<int64_t>& sizes) {
  return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, like.device());
}

// Axes of size 1 fold away: their strides mean nothing.
Image image_of(const Tensor& t);

// The widest access that every one of these allows, for images of `tokens` tokens.
Access access_of(const std::vector<Image>& images, int64_t tokens);

// The same for rows of pixels of `bytes` each, 16 bytes at a time.
Access access_of_rows(const std::vector<Image>& images, int64_t bytes);

}  // namespace efficientvit_kernels::cuda

// Where a launcher registers its functions. The CPU library defines the ops; the emulator's build has a namespace of
// its own, and serves CPU tensors.
#if defined(__CUDACC__)
#define EVK_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(efficientvit_kernels, CUDA, m)
#else
#define EVK_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(efficientvit_kernels_emulated, CPU, m)
#endif
