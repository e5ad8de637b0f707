// Launcher and registration of relu_linear_attention on the CPU: checks, allocation, cutting into tasks.
#include "relu_linear_attention.h"

#include <torch/csrc/stable/library.h>

#include "../schemas.h"
#include "plan.h"
#include "relu_linear_attention_launch.h"

namespace efficientvit_kernels::cpu {
namespace {

// What forward and backward share: checked inputs as kernels take them, and the tasks.
struct Problem {
  Problem(const char* op, const std::vector<Tensor>& qkv, int64_t head_dim, double eps)
      : kernels(relu_linear_attention_kernels_in_use(check(op, qkv, head_dim))) {
    const Tensor& first = qkv[0];
    for (const Tensor& t : qkv) views.push_back(image_of(t));
    batch = first.size(0);
    args.qkv = views.data();
    args.heads = first.size(1) / (3 * head_dim);
    args.groups = args.heads * static_cast<int64_t>(qkv.size());
    args.head_dim = head_dim;
    args.height = first.size(2);
    args.width = first.size(3);
    args.eps = eps;
    chunks = num_chunks(args.tokens(), head_dim);
    state_dtype = first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  static StorageType check(const char* op, const std::vector<Tensor>& qkv, int64_t head_dim) {
    EVK_CHECK(!qkv.empty(), op, "qkv", "at least one tensor", "none");
    EVK_CHECK(head_dim > 0, op, "head_dim", "positive", head_dim);
    for (const Tensor& t : qkv) {
      EVK_CHECK(t.is_cpu(), op, "qkv", "on the CPU", "another device");
      EVK_CHECK(t.dim() == 4, op, "qkv", "of rank 4", t.dim());
      EVK_CHECK(t.scalar_type() == qkv[0].scalar_type(), op, "qkv", "of one dtype", "several");
      for (int64_t axis = 0; axis < 4; ++axis) {
        EVK_CHECK(t.size(axis) == qkv[0].size(axis), op, "qkv", "of one shape", "several");
      }
    }
    EVK_CHECK(qkv[0].size(1) % (3 * head_dim) == 0, op, "qkv.shape[1]", "a multiple of 3 * head_dim", qkv[0].size(1));
    return storage_type(qkv[0], op, "qkv");
  }

  bool empty() const { return batch == 0 || args.groups == 0 || args.tokens() == 0; }
  int64_t pairs() const { return batch * args.groups; }

  Tensor empty_state(const Tensor& like, int64_t leading) const {
    const int64_t sizes[] = {leading, args.groups, args.head_dim + 1, args.head_dim};
    return torch::stable::empty(sizes, state_dtype, std::nullopt, like.device());
  }

  // Runs `body(task, scratch)` for every task, in parallel. A task's sums go to `sums` for chunk 0, to `args.partial`
  // after it.
  template <class Body>
  void for_each_task(Stage stage, void* sums, int64_t flops_per_token, Body body) const {
    const int64_t tokens = args.tokens(), chunk = chunk_tokens(args.head_dim);
    const int64_t bytes = args.state_numel() * (state_dtype == ScalarType::Double ? 8 : 4);
    torch::stable::parallel_for(
        0, pairs() * chunks, grain_size(flops_per_token * tokens / chunks), [&](int64_t begin, int64_t end) {
          void* scratch = thread_scratch(kernels.scratch_bytes(args.head_dim));
          const StageTimer timer(stage);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t pair = i / chunks, c = i % chunks;
            char* sum = c == 0 ? static_cast<char*>(sums) + pair * bytes
                               : static_cast<char*>(args.partial) + ((c - 1) * pairs() + pair) * bytes;
            body(ReluLinearAttentionTask{pair / args.groups, pair % args.groups, c * chunk,
                                         c + 1 == chunks ? tokens : (c + 1) * chunk, sum},
                 scratch);
          }
        });
  }

  // first, then second, which needs first's sums over all of a group's tokens.
  void run(Stage stage, void* sums, ReluLinearAttentionKernels::Kernel first,
           ReluLinearAttentionKernels::Kernel second) const {
    const int64_t flops = 4 * args.head_dim * args.head_dim;
    if (chunks == 1) {  // one task owns the group, so both passes run while its tokens are in the cache
      for_each_task(stage, sums, 2 * flops, [&](const ReluLinearAttentionTask& task, void* scratch) {
        first(args, task, scratch);
        second(args, task, scratch);
      });
      return;
    }
    for_each_task(stage, sums, flops,
                  [&](const ReluLinearAttentionTask& task, void* scratch) { first(args, task, scratch); });
    const int64_t numel = pairs() * args.state_numel();
    state_dtype == ScalarType::Double
        ? reduce_chunks(static_cast<double*>(sums), static_cast<double*>(args.partial), numel, chunks)
        : reduce_chunks(static_cast<float*>(sums), static_cast<float*>(args.partial), numel, chunks);
    for_each_task(stage, sums, flops,
                  [&](const ReluLinearAttentionTask& task, void* scratch) { second(args, task, scratch); });
  }

  ReluLinearAttentionKernels kernels;
  std::vector<ImageTensor> views, grad_views;
  ReluLinearAttentionArgs args{};
  int64_t batch = 0, chunks = 1;
  ScalarType state_dtype = ScalarType::Float;
};

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const std::vector<Tensor>& qkv, int64_t head_dim, double eps) {
  Problem problem("relu_linear_attention", qkv, head_dim, eps);
  ReluLinearAttentionArgs& args = problem.args;
  Tensor out = empty_image(qkv[0], args.groups * head_dim, format_like(qkv[0]));
  Tensor state = problem.empty_state(qkv[0], problem.batch);
  if (problem.empty()) return {out, torch::stable::zero_(state)};
  Tensor partial = problem.empty_state(qkv[0], (problem.chunks - 1) * problem.batch);
  args.out = image_of(out);
  args.state = state.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr();
  problem.run(Stage::kAttentionForward, args.state, problem.kernels.state, problem.kernels.apply);
  return {out, state};
}

Tensor attention_apply(const std::vector<Tensor>& qkv, const Tensor& state, int64_t head_dim, double eps) {
  Problem problem("relu_linear_attention", qkv, head_dim, eps);
  ReluLinearAttentionArgs& args = problem.args;
  const int64_t sizes[] = {problem.batch, args.groups * head_dim, args.height, args.width};
  Tensor out = torch::stable::empty(sizes, problem.state_dtype, std::nullopt, qkv[0].device());
  if (problem.empty()) return out;
  args.out = image_of(out);
  args.state = data_of(state);
  problem.for_each_task(
      Stage::kAttentionForward, args.state, 4 * head_dim * head_dim,
      [&](ReluLinearAttentionTask task, void* scratch) { problem.kernels.apply_wide(args, task, scratch); });
  return out;
}

std::vector<Tensor> attention_backward(const Tensor& grad_out, const std::vector<Tensor>& qkv, const Tensor& state,
                                       int64_t head_dim, double eps, const std::vector<int64_t>& scales) {
  const char* op = "relu_linear_attention_bwd";
  Problem problem(op, qkv, head_dim, eps);
  ReluLinearAttentionArgs& args = problem.args;
  EVK_CHECK(grad_out.is_cpu() && grad_out.scalar_type() == qkv[0].scalar_type() && grad_out.dim() == 4, op, "grad_out",
            "a rank-4 CPU tensor of qkv's dtype", "another tensor");
  EVK_CHECK(grad_out.size(0) == problem.batch && grad_out.size(1) == args.groups * head_dim &&
                grad_out.size(2) == args.height && grad_out.size(3) == args.width,
            op, "grad_out", "[B, G * D, H, W]", "another shape");
  EVK_CHECK(state.is_cpu() && state.is_contiguous() && state.scalar_type() == problem.state_dtype &&
                state.numel() == problem.pairs() * args.state_numel(),
            op, "state", "the contiguous state of the forward", "another tensor");

  std::vector<Tensor> grads;
  problem.grad_views.resize(qkv.size());
  for (int64_t s : scales) {
    EVK_CHECK(s >= 0 && s < static_cast<int64_t>(qkv.size()), op, "scales", "indices into qkv", s);
    EVK_CHECK(problem.grad_views[s].data == nullptr, op, "scales", "distinct", "a repeated index");
    grads.push_back(empty_image(qkv[s], qkv[s].size(1), format_like(qkv[s])));
    problem.grad_views[s] = image_of(grads.back());
  }
  if (problem.empty() || scales.empty()) return grads;
  Tensor grad_state = problem.empty_state(grad_out, problem.batch);
  Tensor partial = problem.empty_state(grad_out, (problem.chunks - 1) * problem.batch);
  args.out = image_of(grad_out);
  args.state = data_of(state);
  args.grad_qkv = problem.grad_views.data();
  args.grad_state = grad_state.mutable_data_ptr();
  args.partial = partial.mutable_data_ptr();
  problem.run(Stage::kAttentionBackward, args.grad_state, problem.kernels.grad_q, problem.kernels.grad_kv);
  return grads;
}

namespace {

std::tuple<Tensor, Tensor> relu_linear_attention_fwd_cpu(std::vector<Tensor> qkv, int64_t head_dim, double eps) {
  count_call();
  return attention_forward(qkv, head_dim, eps);
}

std::vector<Tensor> relu_linear_attention_bwd_cpu(Tensor grad_out, std::vector<Tensor> qkv, Tensor state,
                                                  int64_t head_dim, double eps, std::vector<int64_t> scales) {
  count_call();
  return attention_backward(grad_out, qkv, state, head_dim, eps, scales);
}

}  // namespace
}  // namespace efficientvit_kernels::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(efficientvit_kernels, m) {
  m.def(EVK_RELU_LINEAR_ATTENTION_FWD);
  m.def(EVK_RELU_LINEAR_ATTENTION_BWD);
}

STABLE_TORCH_LIBRARY_IMPL(efficientvit_kernels, CPU, m) {
  m.impl("relu_linear_attention_fwd", TORCH_BOX(&efficientvit_kernels::cpu::relu_linear_attention_fwd_cpu));
  m.impl("relu_linear_attention_bwd", TORCH_BOX(&efficientvit_kernels::cpu::relu_linear_attention_bwd_cpu));
}
