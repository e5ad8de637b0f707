// What lies between the products of lite_mla without torch, for mutants: the launcher and the kernels of a few sizes.
//
// EVK_TRIAL_AGGREGATE_ATTENTION: which tables are compiled: 1 the least, 2 all that differ in what they do.
#include "aggregate_attention.cu"
#include "aggregate_attention_apply_kernels.cuh"
#include "plain_torch.h"
#include "runtime.cu"
#include "sum_splits.cu"

namespace efficientvit_kernels::cuda {

template <class T, int D, int K>
AggregateAttentionKernels aggregate_attention_table() {
  return {aggregate_kv_state_kernel<T, D, K>, aggregate_apply_kernel<T, D, K>};
}

AggregateAttentionKernels aggregate_attention_fp16(int64_t head_dim, int64_t size) {
  if (head_dim == 16 && size == 3) return aggregate_attention_table<__half, 16, 3>();
#if EVK_TRIAL_AGGREGATE_ATTENTION >= 2
  if (head_dim == 8 && size == 5) return aggregate_attention_table<__half, 8, 5>();
  if (head_dim == 32 && size == 7) return aggregate_attention_table<__half, 32, 7>();
#endif
  plain_torch::fail("no kernels of D = ", head_dim, " and K = ", size, " in this trial");
}

AggregateAttentionKernels aggregate_attention_bf16(int64_t, int64_t) { plain_torch::fail("no kernels of bfloat16"); }

// What the launcher leaves to other ops is not of this trial.
std::tuple<Tensor, Tensor> relu_linear_attention_fwd(Tensors, int64_t, double) { plain_torch::fail("not fused"); }
Tensors multiscale_aggregate_fwd(Tensor, Tensors, Tensors, Tensors, Tensors, int64_t) {
  plain_torch::fail("not fused");
}

}  // namespace efficientvit_kernels::cuda

namespace {

constexpr int kMost = 4;  // scales

// As `FusedCall` of tests/cuda_emulator/plain_lite_mla.py. Inputs and results are dense.
struct Call {
  int64_t type, layout, far_outputs, batch, channels, height, width, head_dim, scales, biases, channels_last;
  double eps;
  int64_t sizes[kMost];
  const void* qkv;
  const void *depthwise[kMost], *pointwise[kMost], *depthwise_bias[kMost], *pointwise_bias[kMost];
  void *out, *state;
};

void run(const Call& call) {
  using plain_torch::dense;
  using torch::stable::Tensor;
  const auto type = static_cast<torch::headeronly::ScalarType>(call.type);
  Tensor qkv = plain_torch::image({call.batch, call.channels, call.height, call.width}, type,
                                  static_cast<plain_torch::Layout>(call.layout));
  qkv.copy_from(call.qkv);
  plain_torch::far_outputs = call.far_outputs != 0;
  std::vector<Tensor> depthwise, pointwise, biases[2];
  for (int64_t s = 0; s < call.scales; ++s) {
    depthwise.push_back(dense(call.depthwise[s], {call.channels, 1, call.sizes[s], call.sizes[s]}, type));
    pointwise.push_back(dense(call.pointwise[s], {call.channels, call.head_dim, 1, 1}, type));
    if (call.biases == 0) continue;
    biases[0].push_back(dense(call.depthwise_bias[s], {call.channels}, type));
    biases[1].push_back(dense(call.pointwise_bias[s], {call.channels}, type));
  }
  const auto [out, state] = efficientvit_kernels::cuda::aggregate_attention_fwd(
      qkv, depthwise, pointwise, biases[0], biases[1], call.head_dim, call.eps, call.channels_last != 0);
  out.copy_to(call.out);
  state.copy_to(call.state);
}

}  // namespace

PLAIN_TORCH_EXPORT aggregate_attention(const Call* call) {
  return plain_torch::words_of([=] { run(*call); });
}
