// relu_linear_attention without torch, for mutants: its launcher and the kernels of a few head dimensions, as one
// source.
//
// EVK_TRIAL_HALF, EVK_TRIAL_FP32: which tables are compiled: 0 none, 1 the least, 2 all that differ in what they do.
#include "plain_torch.h"
#include "relu_linear_attention.cu"
#include "relu_linear_attention_backward_kernels.cuh"
#include "relu_linear_attention_fp32_kernels.cuh"
#include "runtime.cu"
#include "sum_splits.cu"

namespace efficientvit_kernels::cuda {

template <class T, int D, Access kAccess>
ReluLinearAttentionKernels half_table() {
  return {kv_state_kernel<T, D, kAccess>, apply_kernel<T, D, kAccess>, grad_state_kernel<T, D, kAccess>,
          grad_kv_kernel<T, D, kAccess>};
}

template <int D>
ReluLinearAttentionKernels fp32_table() {
  return {kv_state_fp32_kernel<D>, apply_fp32_kernel<D>, grad_state_fp32_kernel<D>, grad_kv_fp32_kernel<D>};
}

ReluLinearAttentionKernels relu_linear_attention_fp16([[maybe_unused]] int64_t head_dim,
                                                      [[maybe_unused]] Access access) {
#if EVK_TRIAL_HALF >= 1
  if (head_dim == 16 && access == Access::kTokens) return half_table<__half, 16, Access::kTokens>();
  if (head_dim == 16 && access == Access::kElements) return half_table<__half, 16, Access::kElements>();
#endif
#if EVK_TRIAL_HALF >= 2
  if (head_dim == 16) return half_table<__half, 16, Access::kChannels>();
  if (head_dim == 8 && access == Access::kTokens) return half_table<__half, 8, Access::kTokens>();
  if (head_dim == 8 && access == Access::kChannels) return half_table<__half, 8, Access::kChannels>();
  if (head_dim == 64 && access == Access::kTokens) return half_table<__half, 64, Access::kTokens>();
#endif
  plain_torch::fail("no kernels of D = ", head_dim, " and access ", static_cast<int>(access), " in this trial");
}

ReluLinearAttentionKernels relu_linear_attention_bf16(int64_t head_dim, Access access) {
#if EVK_TRIAL_HALF >= 2
  if (head_dim == 8 && access == Access::kTokens) return half_table<__nv_bfloat16, 8, Access::kTokens>();
#endif
  plain_torch::fail("no kernels of D = ", head_dim, " and access ", static_cast<int>(access), " in this trial");
}

ReluLinearAttentionKernels relu_linear_attention_fp32(int64_t head_dim) {
#if EVK_TRIAL_FP32 >= 1
  if (head_dim == 8) return fp32_table<8>();
#endif
#if EVK_TRIAL_FP32 >= 2
  if (head_dim == 64) return fp32_table<64>();
#endif
  plain_torch::fail("no kernels of D = ", head_dim, " in this trial");
}

}  // namespace efficientvit_kernels::cuda

namespace {

// As `Call` of tests/cuda_emulator/plain_runs.py. Inputs and results are dense.
struct Call {
  int64_t type, layout, far_outputs, batch, channels, height, width, count, head_dim, scale_count;
  double eps;
  int64_t scales[8];
  const void* qkv[8];
  const void* grad_out;
  void *out, *state, *grads[8];
};

void run(const Call& call) {
  namespace cuda = efficientvit_kernels::cuda;
  const auto type = static_cast<torch::headeronly::ScalarType>(call.type);
  const auto placed = [&](const void* values, int64_t channels) {
    auto t = plain_torch::image({call.batch, channels, call.height, call.width}, type,
                                static_cast<plain_torch::Layout>(call.layout));
    t.copy_from(values);
    return t;
  };
  plain_torch::far_outputs = call.far_outputs != 0;
  std::vector<torch::stable::Tensor> qkv;
  for (int64_t i = 0; i < call.count; ++i) qkv.push_back(placed(call.qkv[i], call.channels));
  const auto [out, state] = cuda::relu_linear_attention_fwd(qkv, call.head_dim, call.eps);
  out.copy_to(call.out);
  state.copy_to(call.state);
  const auto grad_out = placed(call.grad_out, call.channels / 3 * call.count);
  const auto grads = cuda::relu_linear_attention_bwd(grad_out, qkv, state, call.head_dim, call.eps,
                                                     {call.scales, call.scales + call.scale_count});
  for (size_t i = 0; i < grads.size(); ++i) grads[i].copy_to(call.grads[i]);
}

}  // namespace

PLAIN_TORCH_EXPORT relu_linear_attention(const Call* call) {
  return plain_torch::words_of([=] { run(*call); });
}
