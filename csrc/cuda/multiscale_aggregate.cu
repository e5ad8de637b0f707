// Launcher and registration of multiscale_aggregate on CUDA: checks, allocation, the plan, launches.
#include <torch/csrc/stable/library.h>

#include "aggregation_weights.h"
#include "multiscale_aggregate.h"
#include "multiscale_aggregate_backward_kernels.cuh"
#include "ops.h"

namespace efficientvit_kernels::cuda {
namespace {

AggregateKernels kernels_of(ScalarType type, int64_t head_dim, int64_t size) {
  if (type == ScalarType::Float) return aggregate_fp32(head_dim, size);
  return type == ScalarType::Half ? aggregate_fp16(head_dim, size) : aggregate_bf16(head_dim, size);
}

Tensor empty_like_weight(const Tensor& weight) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < weight.dim(); ++axis) sizes.push_back(weight.size(axis));
  return torch::stable::empty(sizes, weight.scalar_type(), std::nullopt, weight.device());
}

void check_like(const char* op, const char* arg, const Tensor& t, const Tensor& qkv) {
  EVK_CHECK(on_device(t) && t.get_device_index() == qkv.get_device_index() && t.scalar_type() == qkv.scalar_type() &&
                t.dim() == 4,
            op, arg, "a rank-4 GPU tensor of qkv's dtype", "another tensor");
  for (int64_t axis = 0; axis < 4; ++axis) {
    EVK_CHECK(t.size(axis) == qkv.size(axis), op, arg, "of qkv's shape", "another shape");
  }
}

// Checked inputs, and launches over them.
class Aggregation {
 public:
  Aggregation(const char* op, const Tensor& qkv, int64_t head_dim, const std::vector<Tensor>& depthwise_weights,
              const std::vector<Tensor>& pointwise_weights, const std::vector<Tensor>& depthwise_biases,
              const std::vector<Tensor>& pointwise_biases)
      : op_(op),
        qkv_(qkv),
        head_dim_(head_dim),
        weights_(op, qkv, head_dim, depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases) {}

  size_t scales() const { return weights_.scales(); }
  bool empty() const { return qkv_.numel() == 0; }
  int size(size_t scale) const { return weights_.size(scale); }

  std::vector<Tensor> forward(const Launcher& launch) const {
    std::vector<Tensor> outs;
    for (size_t s = 0; s < scales(); ++s) {
      outs.push_back(empty_image(qkv_, qkv_.size(1)));
      if (empty()) continue;
      const AggregatePlan plan =
          plan_aggregate(qkv_.size(2), qkv_.size(3), static_cast<int>(head_dim_), size(s), bytes(), launch.device());
      const AggregateArgs args = args_for(s, plan, outs.back(), nullptr);
      run(launch, kernels(s).forward, args.tasks * args.parts, plan, args);
    }
    return outs;
  }

  // grad_qkv, where it is wanted, into a tensor, or added to what that holds; of every scale the gradients of depthwise
  // and pointwise weights and biases, as they are wanted.
  std::vector<Tensor> backward(const Launcher& launch, const std::vector<Tensor>& grad_outs, const Tensor* grad_qkv,
                               bool adds, bool needs_weights, bool needs_biases) const {
    const bool needs_qkv = grad_qkv != nullptr;
    std::optional<Tensor> between[2];
    std::vector<Tensor> grads[4];
    for (size_t s = 0; s < scales(); ++s) {
      const int64_t channels[] = {qkv_.size(1)};
      if (needs_weights) {
        grads[0].push_back(empty_like_weight(weights_.depthwise[s]));
        grads[1].push_back(empty_like_weight(weights_.pointwise[s]));
      }
      for (int i = 2; needs_biases && i < 4; ++i) {
        grads[i].push_back(torch::stable::empty(channels, qkv_.scalar_type(), std::nullopt, qkv_.device()));
      }
      if (empty()) continue;
      const AggregateGradPlan plan = plan_aggregate_grad(
          qkv_.size(0), qkv_.size(2), qkv_.size(3), static_cast<int>(head_dim_), size(s), bytes(), launch.device());
      AggregateArgs args = args_for(s, plan, grad_outs[s], grad_qkv);
      args.needs_qkv = needs_qkv;
      args.tasks_per_run = plan.tasks_per_run;
      // What several scales give to grad_qkv is summed in float32, and rounded once.
      if (needs_qkv && s > 0) args.grads_before = static_cast<const float*>(between[(s - 1) % 2]->const_data_ptr());
      if (needs_qkv && s + 1 < scales()) {
        between[s % 2] = empty_floats(qkv_, {qkv_.numel()});
        args.grads_after = static_cast<float*>(between[s % 2]->mutable_data_ptr());
      }
      args.adds = adds && s + 1 == scales();
      const int columns = sums_columns(static_cast<int>(head_dim_), size(s));
      std::optional<Tensor> sums;
      if (needs_weights || needs_biases) {
        sums = empty_floats(qkv_, {plan.runs, qkv_.size(1), columns});
        args.sums = static_cast<float*>(sums->mutable_data_ptr());
      }
      run(launch, kernels(s).gradients, plan.runs * args.parts * (head_dim_ / kChunk), plan, args);
      if (sums.has_value()) add_up(launch, *sums, plan.runs, s, grads);
    }
    for (size_t s = 0; empty() && s < grads[0].size(); ++s) {
      torch::stable::zero_(grads[0][s]), torch::stable::zero_(grads[1][s]);
    }
    for (size_t s = 0; empty() && s < grads[2].size(); ++s) {
      torch::stable::zero_(grads[2][s]), torch::stable::zero_(grads[3][s]);
    }
    std::vector<Tensor> results;
    for (const auto& list : grads) results.insert(results.end(), list.begin(), list.end());
    return results;
  }

 private:
  int bytes() const { return qkv_.scalar_type() == ScalarType::Float ? 4 : 2; }
  AggregateKernels kernels(size_t scale) const { return kernels_of(qkv_.scalar_type(), head_dim_, size(scale)); }

  AggregateArgs args_for(size_t s, const AggregatePlan& plan, const Tensor& out, const Tensor* grad_qkv) const {
    AggregateArgs args{};
    args.qkv = image_of(qkv_);
    args.out = image_of(out);
    std::vector<Image> images{args.qkv, args.out};
    if (grad_qkv != nullptr) images.push_back(args.grad_qkv = image_of(*grad_qkv));
    args.access = access_of_rows(images, bytes());
    weights_.set(args, s);
    args.parts = qkv_.size(1) / head_dim_;
    args.tiles_x = plan.tiles_x;
    args.tiles = plan.tiles;
    args.tasks = qkv_.size(0) * plan.tiles;
    args.height = static_cast<int>(qkv_.size(2));
    args.width = static_cast<int>(qkv_.size(3));
    args.rows = plan.rows;
    args.cols = plan.cols;
    return args;
  }

  void run(const Launcher& launch, AggregateKernels::Kernel kernel, int64_t blocks, const AggregatePlan& plan,
           const AggregateArgs& args) const {
    EVK_CHECK(plan.warps > 0, op_, "the GPU", "of at least 64 KB of shared memory per block",
              launch.device().max_shared_per_block);
    EVK_CHECK(blocks < INT32_MAX, op_, "B * heads * H * W", "fewer, so that there are less than 2^31 blocks", blocks);
    launch(kernel, blocks, 32 * plan.warps, plan.shared_bytes, args);
  }

  void add_up(const Launcher& launch, const Tensor& sums, int64_t runs, size_t s,
              std::vector<Tensor> (&grads)[4]) const {
    const auto data = [&](int i) { return grads[i].empty() ? nullptr : grads[i][s].mutable_data_ptr(); };
    const AggregateGrads args{static_cast<const float*>(sums.const_data_ptr()),
                              data(1),
                              data(0),
                              data(2),
                              data(3),
                              runs,
                              qkv_.size(1),
                              static_cast<int>(head_dim_),
                              size(s) * size(s)};
    const int64_t blocks = ceil_div(qkv_.size(1) * (head_dim_ + args.taps + 2), kThreads);
    const ScalarType type = qkv_.scalar_type();
    launch(type == ScalarType::Float  ? sum_gradients_kernel<float>
           : type == ScalarType::Half ? sum_gradients_kernel<__half>
                                      : sum_gradients_kernel<__nv_bfloat16>,
           blocks, kThreads, 0, args);
  }

  const char* op_;
  const Tensor& qkv_;
  int64_t head_dim_;
  AggregationWeights weights_;
};

// The checked arguments of a backward.
Aggregation backward_of(const char* op, const Tensors& grad_outs, const Tensor& qkv, const Tensors& depthwise_weights,
                        const Tensors& pointwise_weights, const Tensors& depthwise_biases, int64_t head_dim) {
  Aggregation aggregation(op, qkv, head_dim, depthwise_weights, pointwise_weights, depthwise_biases, {});
  EVK_CHECK(grad_outs.size() == depthwise_weights.size(), op, "grad_outs", "one for each scale", "another count");
  for (const Tensor& grad : grad_outs) check_like(op, "grad_outs", grad, qkv);
  return aggregation;
}

// [grad_qkv], then the gradients of the weights, see Aggregation::backward.
Tensors multiscale_aggregate_bwd(Tensors grad_outs, Tensor qkv, Tensors depthwise_weights, Tensors pointwise_weights,
                                 Tensors depthwise_biases, int64_t head_dim, bool needs_qkv, bool needs_weights,
                                 bool needs_biases) {
  const Aggregation aggregation = backward_of("multiscale_aggregate_bwd", grad_outs, qkv, depthwise_weights,
                                              pointwise_weights, depthwise_biases, head_dim);
  count_call();
  const Launcher launch(qkv);
  if (!needs_qkv) return aggregation.backward(launch, grad_outs, nullptr, false, needs_weights, needs_biases);
  Tensor grad_qkv = empty_image(qkv, qkv.size(1));
  if (grad_outs.empty()) torch::stable::zero_(grad_qkv);
  Tensors grads = aggregation.backward(launch, grad_outs, &grad_qkv, false, needs_weights, needs_biases);
  grads.insert(grads.begin(), grad_qkv);
  return grads;
}

// The same with grad_qkv added to what a tensor holds; returns the gradients of the weights.
Tensors multiscale_aggregate_bwd_add(Tensors grad_outs, Tensor qkv, Tensors depthwise_weights,
                                     Tensors pointwise_weights, Tensors depthwise_biases, int64_t head_dim,
                                     bool needs_weights, bool needs_biases, Tensor grad_qkv) {
  const char* op = "multiscale_aggregate_bwd_add";
  const Aggregation aggregation =
      backward_of(op, grad_outs, qkv, depthwise_weights, pointwise_weights, depthwise_biases, head_dim);
  check_like(op, "grad_qkv", grad_qkv, qkv);
  count_call();
  return aggregation.backward(Launcher(qkv), grad_outs, &grad_qkv, true, needs_weights, needs_biases);
}

}  // namespace

std::vector<Tensor> multiscale_aggregate_fwd(Tensor qkv, std::vector<Tensor> depthwise_weights,
                                             std::vector<Tensor> pointwise_weights,
                                             std::vector<Tensor> depthwise_biases, std::vector<Tensor> pointwise_biases,
                                             int64_t head_dim) {
  const Aggregation aggregation("multiscale_aggregate", qkv, head_dim, depthwise_weights, pointwise_weights,
                                depthwise_biases, pointwise_biases);
  count_call();
  return aggregation.forward(Launcher(qkv));
}

}  // namespace efficientvit_kernels::cuda

EVK_CUDA_LIBRARY_IMPL(m) {
  m.impl("multiscale_aggregate_fwd", TORCH_BOX(&efficientvit_kernels::cuda::multiscale_aggregate_fwd));
  m.impl("multiscale_aggregate_bwd", TORCH_BOX(&efficientvit_kernels::cuda::multiscale_aggregate_bwd));
  m.impl("multiscale_aggregate_bwd_add", TORCH_BOX(&efficientvit_kernels::cuda::multiscale_aggregate_bwd_add));
}
