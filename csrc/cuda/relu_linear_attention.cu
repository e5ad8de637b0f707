// Launcher and registration of relu_linear_attention on CUDA: checks, allocation, the plan, launches.
#include <torch/csrc/stable/library.h>

#include "ops.h"
#include "relu_linear_attention.h"
#include "relu_linear_attention_kernels.cuh"
#include "runtime.h"
#include "sum_splits.h"

namespace efficientvit_kernels::cuda {
namespace {

using Kernels = ReluLinearAttentionKernels;
using Kernel = Kernels::Kernel;

Kernels kernels_of(ScalarType type, int64_t head_dim, Access access) {
  if (type == ScalarType::Float) return relu_linear_attention_fp32(head_dim);
  return type == ScalarType::Half ? relu_linear_attention_fp16(head_dim, access)
                                  : relu_linear_attention_bf16(head_dim, access);
}

void check_qkv(const char* op, const std::vector<Tensor>& qkv, int64_t head_dim) {
  EVK_CHECK(!qkv.empty(), op, "qkv", "at least one tensor", "none");
  EVK_CHECK(has_head_dim(head_dim), op, "head_dim", "8, 16, 32 or 64", head_dim);
  const ScalarType type = qkv[0].scalar_type();
  EVK_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, op, "qkv",
            "float16, bfloat16 or float32", "another dtype");
  for (const Tensor& t : qkv) {
    EVK_CHECK(on_device(t) && t.get_device_index() == qkv[0].get_device_index(), op, "qkv", "on one GPU", "others");
    EVK_CHECK(t.dim() == 4, op, "qkv", "of rank 4", t.dim());
    EVK_CHECK(t.scalar_type() == type, op, "qkv", "of one dtype", "several");
    for (int64_t axis = 0; axis < 4; ++axis) {
      EVK_CHECK(t.size(axis) == qkv[0].size(axis), op, "qkv", "of one shape", "several");
    }
  }
  EVK_CHECK(qkv[0].size(1) % (3 * head_dim) == 0, op, "qkv.shape[1]", "a multiple of 3 * head_dim", qkv[0].size(1));
  EVK_CHECK(qkv[0].size(2) * qkv[0].size(3) < INT32_MAX, op, "H * W", "less than 2^31 - 1", "more");
}

// Of checked inputs: sizes, the plan, the kernels, and launches over the scales that are asked for.
class Problem {
 public:
  Problem(const char* op, const std::vector<Tensor>& qkv, int64_t head_dim, double eps, const Launcher& launch)
      : op_(op), qkv_(qkv), launch_(launch), type_(qkv[0].scalar_type()) {
    const Tensor& first = qkv[0];
    batch = first.size(0);
    tokens = first.size(2) * first.size(3);
    heads_ = first.size(1) / (3 * head_dim);
    groups = heads_ * static_cast<int64_t>(qkv.size());
    this->head_dim = head_dim;
    eps_ = static_cast<float>(eps);
    if (!empty()) {
      plan = plan_relu_linear_attention(batch * groups, tokens, static_cast<int>(head_dim), type_ == ScalarType::Float,
                                        launch.device());
    }
  }

  bool empty() const { return batch == 0 || groups == 0 || tokens == 0; }

  // One launch per kMaxScales of the scales; the rest of `args` stands for all of them.
  void run(Kernel Kernels::* kernel, const TokenPlan& plan, ReluLinearAttentionArgs args, const Tensor& out,
           const std::vector<int64_t>& scales, const std::vector<Tensor>* grads = nullptr) const {
    for (size_t begin = 0; begin < scales.size(); begin += kMaxScales) {
      const size_t count = std::min<size_t>(kMaxScales, scales.size() - begin);
      std::vector<Image> images{args.out = image_of(out)};
      for (size_t i = 0; i < count; ++i) {
        args.scales[i] = static_cast<int>(scales[begin + i]);
        images.push_back(args.qkv[i] = image_of(qkv_[args.scales[i]]));
        if (grads != nullptr) images.push_back(args.grad_qkv[i] = image_of((*grads)[begin + i]));
      }
      args.groups = groups;
      args.groups_here = heads_ * static_cast<int64_t>(count);
      args.heads = static_cast<int>(heads_);
      args.tokens = static_cast<int>(tokens);
      args.block_tokens = static_cast<int>(plan.block_tokens);
      args.blocks = plan.blocks;
      args.eps = eps_;
      const int64_t blocks = batch * args.groups_here * plan.blocks;
      EVK_CHECK(blocks < INT32_MAX, op_, "B * heads", "fewer, so that there are less than 2^31 blocks", blocks);
      const Access access = access_of(images, tokens);
      const int64_t shared = plan.shared_bytes + (access == Access::kElements ? plan.stage_bytes : 0);
      launch_(kernels_of(type_, head_dim, access).*kernel, blocks, 32 * plan.warps, shared, args);
    }
  }

  Tensor empty_states(int64_t splits) const {
    return empty_floats(qkv_[0], {batch, groups, splits, head_dim + 1, head_dim});
  }

  // What the readers of `states` [B, G, splits, D + 1, D] take: the sum, where there are many.
  Tensor readable(const Tensor& states, std::optional<Tensor> to = std::nullopt) const {
    if (!plan.sums_splits) return states;
    Tensor sums = to.has_value() ? *to : empty_states(1);
    sum_splits(launch_, static_cast<const float*>(states.const_data_ptr()),
               static_cast<float*>(sums.mutable_data_ptr()), batch * groups, plan.splits(), (head_dim + 1) * head_dim);
    return sums;
  }

  int64_t batch, tokens, groups, head_dim;
  ReluLinearAttentionPlan plan{};

 private:
  const char* op_;
  const std::vector<Tensor>& qkv_;
  const Launcher& launch_;
  ScalarType type_;
  int64_t heads_;
  float eps_;
};

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::vector<Tensor> relu_linear_attention_bwd(Tensor grad_out, std::vector<Tensor> qkv, Tensor state, int64_t head_dim,
                                              double eps, std::vector<int64_t> scales) {
  const char* op = "relu_linear_attention_bwd";
  check_qkv(op, qkv, head_dim);
  count_call();
  const Launcher launch(qkv[0]);
  const Problem problem(op, qkv, head_dim, eps, launch);
  EVK_CHECK(on_device(grad_out) && grad_out.scalar_type() == qkv[0].scalar_type() && grad_out.dim() == 4, op,
            "grad_out", "a rank-4 GPU tensor of qkv's dtype", "another tensor");
  EVK_CHECK(grad_out.size(0) == problem.batch && grad_out.size(1) == problem.groups * head_dim &&
                grad_out.size(2) == qkv[0].size(2) && grad_out.size(3) == qkv[0].size(3),
            op, "grad_out", "[B, G * D, H, W]", "another shape");
  EVK_CHECK(on_device(state) && state.is_contiguous() && state.scalar_type() == ScalarType::Float &&
                state.numel() == problem.batch * problem.groups * (head_dim + 1) * head_dim,
            op, "state", "the contiguous state of the forward", "another tensor");
  std::vector<Tensor> grads;
  std::vector<bool> taken(qkv.size());
  for (const int64_t s : scales) {
    EVK_CHECK(s >= 0 && s < static_cast<int64_t>(qkv.size()), op, "scales", "indices into qkv", s);
    EVK_CHECK(!taken[s], op, "scales", "distinct", "a repeated index");
    taken[s] = true;
    grads.push_back(empty_image(qkv[s], qkv[s].size(1)));
  }
  if (problem.empty() || scales.empty()) return grads;

  Tensor grad_states = problem.empty_states(problem.plan.splits());
  ReluLinearAttentionArgs args{};
  args.states = floats(state);
  args.splits = 1;
  args.sums = mutable_floats(grad_states);
  problem.run(&Kernels::grad_state, problem.plan.grad_state, args, grad_out, scales, &grads);
  const Tensor readable = problem.readable(grad_states);
  args = {};
  args.states = floats(readable);
  args.splits = problem.plan.states_to_read();
  problem.run(&Kernels::grad_kv, problem.plan.grad_kv, args, grad_out, scales, &grads);
  return grads;
}

}  // namespace

std::tuple<Tensor, Tensor> relu_linear_attention_fwd(std::vector<Tensor> qkv, int64_t head_dim, double eps) {
  const char* op = "relu_linear_attention";
  check_qkv(op, qkv, head_dim);
  count_call();
  const Launcher launch(qkv[0]);
  const Problem problem(op, qkv, head_dim, eps, launch);
  Tensor out = empty_image(qkv[0], problem.groups * head_dim);
  Tensor state = empty_floats(qkv[0], {problem.batch, problem.groups, head_dim + 1, head_dim});
  if (problem.empty()) return {out, torch::stable::zero_(state)};

  std::vector<int64_t> scales(qkv.size());
  for (size_t i = 0; i < scales.size(); ++i) scales[i] = static_cast<int64_t>(i);
  const bool split = problem.plan.splits() > 1;
  Tensor states = split ? problem.empty_states(problem.plan.splits()) : state;
  ReluLinearAttentionArgs args{};
  args.sums = mutable_floats(states);
  problem.run(&Kernels::kv_state, problem.plan.kv_state, args, out, scales);
  const Tensor readable = problem.readable(states, state);
  args = {};
  args.states = floats(readable);
  args.splits = problem.plan.states_to_read();
  args.state = args.splits > 1 ? mutable_floats(state) : nullptr;
  problem.run(&Kernels::apply, problem.plan.apply, args, out, scales);
  return {out, state};
}

}  // namespace efficientvit_kernels::cuda

EVK_CUDA_LIBRARY_IMPL(m) {
  m.impl("relu_linear_attention_fwd", TORCH_BOX(&efficientvit_kernels::cuda::relu_linear_attention_fwd));
  m.impl("relu_linear_attention_bwd", TORCH_BOX(&efficientvit_kernels::cuda::relu_linear_attention_bwd));
}
