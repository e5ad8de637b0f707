// multiscale_aggregate without torch, for mutants: its launcher and the kernels of a few sizes, as one source.
//
// EVK_TRIAL_AGGREGATE: which tables are compiled: 1 the least, 2 all that differ in what they do.
#include "multiscale_aggregate.cu"
#include "plain_torch.h"
#include "runtime.cu"

namespace efficientvit_kernels::cuda {

template <class T, int D, int K>
AggregateKernels aggregate_table() {
  return {aggregate_kernel<T, D, K>, aggregate_gradients_kernel<T, D, K>};
}

[[noreturn]] AggregateKernels no_table(int64_t head_dim, int64_t size) {
  plain_torch::fail("no kernels of D = ", head_dim, " and K = ", size, " in this trial");
}

AggregateKernels aggregate_fp16(int64_t head_dim, int64_t size) {
  if (head_dim == 16 && size == 3) return aggregate_table<__half, 16, 3>();
#if EVK_TRIAL_AGGREGATE >= 2
  if (head_dim == 8 && size == 7) return aggregate_table<__half, 8, 7>();
  if (head_dim == 64 && size == 5) return aggregate_table<__half, 64, 5>();
#endif
  no_table(head_dim, size);
}

AggregateKernels aggregate_bf16(int64_t head_dim, int64_t size) { no_table(head_dim, size); }

AggregateKernels aggregate_fp32(int64_t head_dim, int64_t size) {
#if EVK_TRIAL_AGGREGATE >= 2
  if (head_dim == 16 && size == 5) return aggregate_table<float, 16, 5>();
#endif
  no_table(head_dim, size);
}

}  // namespace efficientvit_kernels::cuda

namespace {

constexpr int kMost = 4;  // scales

// As `Call` of tests/cuda_emulator/plain_aggregate.py. Inputs and results are dense.
struct Call {
  int64_t type, layout, far_outputs, batch, channels, height, width, head_dim, scales, biases;
  int64_t needs_qkv, needs_weights, needs_biases;
  int64_t adds;  // grads[0] holds what the gradient of qkv is added to
  int64_t sizes[kMost];
  const void* qkv;
  const void *depthwise[kMost], *pointwise[kMost], *depthwise_bias[kMost], *pointwise_bias[kMost], *grad_outs[kMost];
  void* outs[kMost];
  void* grads[1 + 4 * kMost];  // those that are needed, in the launcher's order
};

void run(const Call& call) {
  namespace cuda = efficientvit_kernels::cuda;
  using plain_torch::dense;
  using torch::stable::Tensor;
  const auto type = static_cast<torch::headeronly::ScalarType>(call.type);
  const auto placed = [&](const void* values) {
    Tensor t = plain_torch::image({call.batch, call.channels, call.height, call.width}, type,
                                  static_cast<plain_torch::Layout>(call.layout));
    t.copy_from(values);
    return t;
  };
  plain_torch::far_outputs = call.far_outputs != 0;
  const Tensor qkv = placed(call.qkv);
  std::vector<Tensor> depthwise, pointwise, biases[2], grad_outs;
  for (int64_t s = 0; s < call.scales; ++s) {
    depthwise.push_back(dense(call.depthwise[s], {call.channels, 1, call.sizes[s], call.sizes[s]}, type));
    pointwise.push_back(dense(call.pointwise[s], {call.channels, call.head_dim, 1, 1}, type));
    grad_outs.push_back(placed(call.grad_outs[s]));
    if (call.biases == 0) continue;
    biases[0].push_back(dense(call.depthwise_bias[s], {call.channels}, type));
    biases[1].push_back(dense(call.pointwise_bias[s], {call.channels}, type));
  }
  const auto outs = cuda::multiscale_aggregate_fwd(qkv, depthwise, pointwise, biases[0], biases[1], call.head_dim);
  for (size_t s = 0; s < outs.size(); ++s) outs[s].copy_to(call.outs[s]);
  std::vector<Tensor> grads;
  if (call.adds != 0) {
    const Tensor grad_qkv = placed(call.grads[0]);
    grads = cuda::multiscale_aggregate_bwd_add(grad_outs, qkv, depthwise, pointwise, biases[0], call.head_dim,
                                               call.needs_weights != 0, call.needs_biases != 0, grad_qkv);
    grads.insert(grads.begin(), grad_qkv);
  } else {
    grads = cuda::multiscale_aggregate_bwd(grad_outs, qkv, depthwise, pointwise, biases[0], call.head_dim,
                                           call.needs_qkv != 0, call.needs_weights != 0, call.needs_biases != 0);
  }
  for (size_t i = 0; i < grads.size(); ++i) grads[i].copy_to(call.grads[i]);
}

}  // namespace

PLAIN_TORCH_EXPORT multiscale_aggregate(const Call* call) {
  return plain_torch::words_of([=] { run(*call); });
}
