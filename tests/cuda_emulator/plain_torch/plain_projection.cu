// The projection of lite_mla and its epilogue without torch, for mutants: launchers and all kernels.
#include "plain_torch.h"
#include "projection.cu"
#include "runtime.cu"

namespace {

// As `ProjectionCall` of tests/cuda_emulator/plain_lite_mla.py. Inputs and results are dense; what is null is left out.
struct Call {
  int64_t type, layout, batch, channels, out_channels, height, width, multiprocessors;
  const void *x, *weight;  // without x, the epilogue alone
  const void *scale, *shift, *residual;
  void* y;
};

void run(const Call& call) {
  namespace cuda = efficientvit_kernels::cuda;
  using plain_torch::dense, plain_torch::image, plain_torch::Layout;
  const auto type = static_cast<torch::headeronly::ScalarType>(call.type);
  const auto placed = [&](const void* values, int64_t channels, Layout layout) {
    auto t = image({call.batch, channels, call.height, call.width}, type, layout);
    t.copy_from(values);
    return t;
  };
  const auto vector = [&](const void* values) {
    return values == nullptr ? cuda::MaybeTensor{}
                             : dense(values, {call.out_channels}, torch::headeronly::ScalarType::Float);
  };
  const auto layout = static_cast<Layout>(call.layout);
  emulator::device().multiprocessors = static_cast<int>(call.multiprocessors);
  const auto y = placed(call.y, call.out_channels, layout);
  cuda::MaybeTensor residual;
  if (call.residual != nullptr) residual = placed(call.residual, call.out_channels, layout);
  if (call.x == nullptr) {
    cuda::projection_epilogue(y, vector(call.scale), vector(call.shift), residual);
  } else {
    cuda::projection(dense(call.weight, {call.out_channels, call.channels}, type),
                     placed(call.x, call.channels, Layout::kChannelsLast), vector(call.scale), vector(call.shift),
                     residual, y);
  }
  y.copy_to(call.y);
}

}  // namespace

PLAIN_TORCH_EXPORT projection(const Call* call) {
  return plain_torch::words_of([=] { run(*call); });
}
