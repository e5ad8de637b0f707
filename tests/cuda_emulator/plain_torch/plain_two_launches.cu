// lite_mla in two launches without torch, for mutants: the launcher and the kernels of a few sizes.
//
// EVK_TRIAL_TWO_LAUNCHES: which tables are compiled: 1 the least, 2 all that differ in what they do.
#include "lite_mla.cu"
#include "plain_torch.h"
#include "runtime.cu"
#include "sum_splits.cu"

namespace efficientvit_kernels::cuda {

template <class T, int D, int K>
LiteMlaKernels lite_mla_table() {
  return {lite_mla_state_kernel<T, D, K>, lite_mla_apply_kernel<T, D, K>};
}

LiteMlaKernels lite_mla_fp16(int64_t head_dim, int64_t size) {
  if (head_dim == 16 && size == 3) return lite_mla_table<__half, 16, 3>();
#if EVK_TRIAL_TWO_LAUNCHES >= 2
  if (head_dim == 8 && size == 5) return lite_mla_table<__half, 8, 5>();
  if (head_dim == 32 && size == 7) return lite_mla_table<__half, 32, 7>();
#endif
  plain_torch::fail("no kernels of D = ", head_dim, " and K = ", size, " in this trial");
}

LiteMlaKernels lite_mla_bf16(int64_t, int64_t) { plain_torch::fail("no kernels of bfloat16"); }

}  // namespace efficientvit_kernels::cuda

namespace {

// As `Call` of tests/cuda_emulator/plain_two_launches.py. Inputs and results are dense; what is null is left out.
struct Call {
  int64_t type, layout, far_outputs, batch, channels, height, width, heads, head_dim, size, out_channels;
  double eps;
  const void *x, *qkv_weight, *depthwise, *pointwise, *proj_weight;
  const void *qkv_bias, *depthwise_bias, *pointwise_bias, *scale, *shift, *residual;
  void* y;
};

void run(const Call& call) {
  namespace cuda = efficientvit_kernels::cuda;
  using plain_torch::dense;
  using torch::stable::Tensor;
  const auto type = static_cast<torch::headeronly::ScalarType>(call.type);
  const int64_t width = call.heads * call.head_dim;
  const auto image = [&](const void* values, int64_t channels) {
    Tensor t = plain_torch::image({call.batch, channels, call.height, call.width}, type,
                                  static_cast<plain_torch::Layout>(call.layout));
    t.copy_from(values);
    return t;
  };
  const auto vector = [&](const void* values, int64_t count, torch::headeronly::ScalarType of) {
    return values == nullptr ? cuda::MaybeTensor{} : dense(values, {count}, of);
  };
  const auto list = [&](const void* values) {
    return values == nullptr ? std::vector<Tensor>{} : std::vector<Tensor>{dense(values, {3 * width}, type)};
  };
  const auto floats = torch::headeronly::ScalarType::Float;
  const Tensor x = image(call.x, call.channels);
  cuda::MaybeTensor residual;
  if (call.residual != nullptr) residual = image(call.residual, call.out_channels);
  plain_torch::far_outputs = call.far_outputs != 0;
  const auto y = cuda::lite_mla_two_launches(
      x, dense(call.qkv_weight, {3 * width, call.channels}, type),
      {dense(call.depthwise, {3 * width, 1, call.size, call.size}, type)},
      {dense(call.pointwise, {3 * width, call.head_dim, 1, 1}, type)},
      dense(call.proj_weight, {call.out_channels, 2 * width}, type), vector(call.qkv_bias, 3 * width, type),
      list(call.depthwise_bias), list(call.pointwise_bias), vector(call.scale, call.out_channels, floats),
      vector(call.shift, call.out_channels, floats), residual, call.head_dim, call.eps, true);
  if (y.size() != 1) plain_torch::fail("the plan has no two launches for this sample");
  y[0].copy_to(call.y);
}

}  // namespace

PLAIN_TORCH_EXPORT two_launches(const Call* call) {
  return plain_torch::words_of([=] { run(*call); });
}
