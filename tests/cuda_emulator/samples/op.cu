// An op on torch's stable ABI whose launcher runs in the emulator.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "platform.cuh"

namespace {

__global__ void double_kernel(const float* x, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 2.0f * x[i];
}

torch::stable::Tensor doubled(const torch::stable::Tensor& x) {
  auto out = torch::stable::empty_like(x);
  const auto blocks = static_cast<unsigned>((x.numel() + 127) / 128);
  emulator::launch(double_kernel, dim3(blocks), dim3(128), 0, static_cast<const float*>(x.data_ptr()),
                   static_cast<float*>(out.data_ptr()), x.numel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(efficientvit_kernels_emulator_sample, m) { m.def("doubled(Tensor x) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(efficientvit_kernels_emulator_sample, CPU, m) { m.impl("doubled", TORCH_BOX(&doubled)); }
