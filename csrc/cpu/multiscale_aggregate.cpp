// Launcher and registration of multiscale_aggregate on the CPU: checks, allocation, cutting into tasks.
#include "multiscale_aggregate.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../schemas.h"
#include "multiscale_aggregate_launch.h"
#include "plan.h"

namespace efficientvit_kernels::cpu {
namespace {

void check_weight(const char* op, const char* arg, const Tensor& weight, const Tensor& like, int64_t rows) {
  EVK_CHECK(weight.is_cpu(), op, arg, "on the CPU", "another device");
  EVK_CHECK(weight.scalar_type() == like.scalar_type(), op, arg, "of qkv's dtype", "another dtype");
  EVK_CHECK(weight.dim() >= 1 && weight.size(0) == rows, op, arg, "of as many rows as qkv has channels",
            weight.dim() >= 1 ? weight.size(0) : 0);
}

void check_image(const char* op, const char* arg, const Tensor& image, const Tensor& like) {
  EVK_CHECK(image.is_cpu() && image.scalar_type() == like.scalar_type() && image.dim() == 4, op, arg,
            "a rank-4 CPU tensor of qkv's dtype", "another tensor");
  for (int64_t axis = 0; axis < 4; ++axis) {
    EVK_CHECK(image.size(axis) == like.size(axis), op, arg, "of qkv's shape", "another shape");
  }
}

// Runs body(task, scratch) for the tiles of every part of every image, `tiles_per_task` at a time.
template <class Body>
void for_each_task(int64_t batch, int64_t parts, const TileGrid& grid, int64_t tiles_per_task, int64_t flops_per_tile,
                   int64_t scratch_bytes, Stage stage, Body body) {
  const int64_t chunks = (grid.tiles() + tiles_per_task - 1) / tiles_per_task;
  torch::stable::parallel_for(
      0, batch * parts * chunks, grain_size(flops_per_tile * tiles_per_task), [&](int64_t begin, int64_t end) {
        void* scratch = thread_scratch(scratch_bytes);
        const StageTimer timer(stage);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t chunk = i % chunks, part = i / chunks % parts, b = i / chunks / parts;
          const int64_t tile0 = grid.tiles() * chunk / chunks, tile1 = grid.tiles() * (chunk + 1) / chunks;
          body(MultiscaleAggregateTask{b, part, tile0, tile1, nullptr}, i, scratch);
        }
      });
}

int64_t flops_per_token(const MultiscaleAggregateArgs& args) {
  int64_t flops = 0;
  for (int64_t s = 0; s < args.num_scales; ++s) {
    flops += 2 * args.head_dim * (args.scales[s].size * args.scales[s].size + args.head_dim);
  }
  return flops;
}

// Sums the tasks' gradients over images and chunks, in order, and rounds them once. `offset` is where a gradient of
// `numel` values per part begins in a task's memory.
template <class T>
void reduce_tasks(const T* partial, int64_t batch, int64_t parts, int64_t chunks, int64_t stride, int64_t offset,
                  int64_t numel, const Tensor& out) {
  const StorageType type = storage_type(out, "multiscale_aggregate_bwd", "weights");
  torch::stable::parallel_for(0, parts, grain_size(batch * chunks * numel), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(numel);
    for (int64_t part = begin; part < end; ++part) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const T* from = partial + ((b * parts + part) * chunks + chunk) * stride + offset;
          for (int64_t i = 0; i < numel; ++i) sum[i] += from[i];
        }
      }
      store_rounded(sum.data(), numel, type, data_of(out), part * numel);
    }
  });
}

}  // namespace

Aggregation::Aggregation(const char* op, const Tensor& like, int64_t channels, int64_t head_dim,
                         const std::vector<Tensor>& depthwise_weights, const std::vector<Tensor>& pointwise_weights,
                         const std::vector<Tensor>& depthwise_biases, const std::vector<Tensor>& pointwise_biases)
    : head_dim_(head_dim),
      parts_(channels / head_dim),
      type_(storage_type(like, op, "qkv")),
      kernels_(multiscale_aggregate_kernels_in_use(type_)) {
  const size_t scales = depthwise_weights.size();
  EVK_CHECK(pointwise_weights.size() == scales, op, "pointwise_weights", "as many as depthwise_weights",
            "another count");
  EVK_CHECK(depthwise_biases.empty() || depthwise_biases.size() == scales, op, "depthwise_biases",
            "none, or as many as depthwise_weights", "another count");
  EVK_CHECK(pointwise_biases.empty() || pointwise_biases.size() == scales, op, "pointwise_biases",
            "none, or as many as depthwise_weights", "another count");
  for (size_t s = 0; s < scales; ++s) {
    const Tensor &depthwise = depthwise_weights[s], &pointwise = pointwise_weights[s];
    check_weight(op, "depthwise_weights", depthwise, like, channels);
    check_weight(op, "pointwise_weights", pointwise, like, channels);
    EVK_CHECK(depthwise.dim() == 4 && depthwise.size(1) == 1 && depthwise.size(2) == depthwise.size(3) &&
                  depthwise.size(2) % 2 == 1,
              op, "depthwise_weights", "[channels, 1, k, k] with an odd k", "another shape");
    EVK_CHECK(pointwise.dim() == 4 && pointwise.numel() == channels * head_dim && pointwise.size(1) == head_dim, op,
              "pointwise_weights", "[channels, head_dim, 1, 1]", "another shape");
    depthwise_.push_back(as_contiguous(depthwise));
    pointwise_.push_back(as_contiguous(pointwise));
    AggregateScale scale{
        depthwise.size(2), data_of(depthwise_[s]), data_of(pointwise_[s]), nullptr, nullptr, {}, nullptr};
    if (!depthwise_biases.empty()) {
      check_weight(op, "depthwise_biases", depthwise_biases[s], like, channels);
      depthwise_bias_.push_back(as_contiguous(depthwise_biases[s]));
      scale.depthwise_bias = data_of(depthwise_bias_[s]);
    }
    if (!pointwise_biases.empty()) {
      check_weight(op, "pointwise_biases", pointwise_biases[s], like, channels);
      pointwise_bias_.push_back(as_contiguous(pointwise_biases[s]));
      scale.pointwise_bias = data_of(pointwise_bias_[s]);
    }
    prepared_.emplace_back(at_least(1, parts_ * kernels_.prepared_numel(head_dim, scale.size) * compute_bytes(like)));
    scale.prepared = prepared_.back().data;
    torch::stable::parallel_for(0, parts_, grain_size(16 * head_dim * (head_dim + scale.size * scale.size)),
                                [&](int64_t begin, int64_t end) {
                                  const StageTimer timer(Stage::kPackWeights);
                                  for (int64_t part = begin; part < end; ++part) {
                                    kernels_.prepare(scale, head_dim, part, prepared_.back().data);
                                  }
                                });
    scales_.push_back(scale);
  }
}

MultiscaleAggregateArgs Aggregation::args_for(const Tensor& qkv, const std::vector<AggregateScale>& scales) const {
  MultiscaleAggregateArgs args{};
  args.qkv = image_of(qkv);
  args.scales = scales.data();
  args.num_scales = static_cast<int64_t>(scales.size());
  args.parts = parts_;
  args.head_dim = head_dim_;
  args.height = qkv.size(2);
  args.width = qkv.size(3);
  return args;
}

std::vector<Tensor> Aggregation::forward(const Tensor& qkv) const {
  std::vector<Tensor> outs;
  std::vector<AggregateScale> scales = scales_;
  for (AggregateScale& scale : scales) {
    outs.push_back(empty_image(qkv, qkv.size(1), format_like(qkv)));
    scale.out = image_of(outs.back());
  }
  if (qkv.numel() == 0 || scales.empty()) return outs;
  const MultiscaleAggregateArgs args = args_for(qkv, scales);
  const TileGrid grid(args.height, args.width, aggregate_tokens(args.width));
  for_each_task(qkv.size(0), parts_, grid, 1, flops_per_token(args) * kAggregateTokens,
                kernels_.forward_bytes(args, grid), Stage::kAggregate,
                [&](const MultiscaleAggregateTask& task, int64_t, void* scratch) {
                  kernels_.forward(args, grid, task, scratch);
                });
  return outs;
}

Aggregation::Grads Aggregation::backward(const std::vector<Tensor>& grad_outs, const Tensor& qkv,
                                         const Tensor* grad_qkv, bool accumulate, bool needs_weights,
                                         bool needs_biases) const {
  std::vector<AggregateScale> scales = scales_;
  for (size_t s = 0; s < scales.size(); ++s) scales[s].out = image_of(grad_outs[s]);
  MultiscaleAggregateArgs args = args_for(qkv, scales);
  if (grad_qkv != nullptr) args.grad_qkv = image_of(*grad_qkv);
  args.accumulate = accumulate;
  args.needs_weights = needs_weights || needs_biases;
  const TileGrid grid(args.height, args.width, kAggregateGradTokens);
  const bool empty = qkv.numel() == 0;
  const int64_t batch = empty ? 0 : qkv.size(0), stride = args.grad_numel();
  const int64_t tiles_per_task = at_least(1, kAggregateGradTokensPerTask / kAggregateGradTokens);
  const int64_t chunks = empty ? 1 : (grid.tiles() + tiles_per_task - 1) / tiles_per_task;
  const int64_t bytes = compute_bytes(qkv);
  const Buffer partial(at_least(1, args.needs_weights ? batch * parts_ * chunks * stride * bytes : 0));
  if (!empty && !scales.empty()) {
    for_each_task(batch, parts_, grid, tiles_per_task, 4 * flops_per_token(args) * kAggregateGradTokens,
                  kernels_.backward_bytes(args, grid), Stage::kAggregateBackward,
                  [&](MultiscaleAggregateTask task, int64_t i, void* scratch) {
                    task.grads = static_cast<char*>(partial.data) + i * stride * bytes;
                    kernels_.backward(args, grid, task, scratch);
                  });
  }

  Grads grads;
  int64_t offset = 0;
  auto reduce = [&](const Tensor& like, int64_t numel, bool wanted, std::vector<Tensor>& into) {
    if (wanted) {
      Tensor out = empty_like_weight(like);
      if (bytes == 8) {
        reduce_tasks(static_cast<const double*>(partial.data), batch, parts_, chunks, stride, offset, numel, out);
      } else {
        reduce_tasks(static_cast<const float*>(partial.data), batch, parts_, chunks, stride, offset, numel, out);
      }
      into.push_back(out);
    }
    offset += numel;
  };
  for (size_t s = 0; s < scales.size(); ++s) {
    const int64_t taps = scales[s].size * scales[s].size;
    const int64_t sizes[] = {parts_ * head_dim_};
    const Tensor bias = torch::stable::empty(sizes, qkv.scalar_type(), std::nullopt, qkv.device());
    reduce(pointwise_[s], head_dim_ * head_dim_, needs_weights, grads.pointwise_weights);
    reduce(depthwise_[s], head_dim_ * taps, needs_weights, grads.depthwise_weights);
    reduce(bias, head_dim_, needs_biases, grads.depthwise_biases);
    reduce(bias, head_dim_, needs_biases, grads.pointwise_biases);
  }
  return grads;
}

namespace {

void check_qkv(const char* op, const Tensor& qkv, int64_t head_dim) {
  EVK_CHECK(head_dim > 0, op, "head_dim", "positive", head_dim);
  EVK_CHECK(qkv.is_cpu() && qkv.dim() == 4, op, "qkv", "a rank-4 CPU tensor", "another tensor");
  EVK_CHECK(qkv.size(1) % (3 * head_dim) == 0, op, "qkv.shape[1]", "a multiple of 3 * head_dim", qkv.size(1));
}

std::vector<Tensor> multiscale_aggregate_fwd_cpu(Tensor qkv, std::vector<Tensor> depthwise_weights,
                                                 std::vector<Tensor> pointwise_weights,
                                                 std::vector<Tensor> depthwise_biases,
                                                 std::vector<Tensor> pointwise_biases, int64_t head_dim) {
  const char* op = "multiscale_aggregate";
  count_call();
  check_qkv(op, qkv, head_dim);
  const Aggregation aggregation(op, qkv, qkv.size(1), head_dim, depthwise_weights, pointwise_weights, depthwise_biases,
                                pointwise_biases);
  return aggregation.forward(qkv);
}

std::vector<Tensor> multiscale_aggregate_bwd_cpu(std::vector<Tensor> grad_outs, Tensor qkv,
                                                 std::vector<Tensor> depthwise_weights,
                                                 std::vector<Tensor> pointwise_weights,
                                                 std::vector<Tensor> depthwise_biases, int64_t head_dim, bool needs_qkv,
                                                 bool needs_weights, bool needs_biases) {
  const char* op = "multiscale_aggregate_bwd";
  count_call();
  check_qkv(op, qkv, head_dim);
  const Aggregation aggregation(op, qkv, qkv.size(1), head_dim, depthwise_weights, pointwise_weights, depthwise_biases,
                                {});
  EVK_CHECK(grad_outs.size() == depthwise_weights.size(), op, "grad_outs", "one for each scale", "another count");
  for (const Tensor& grad : grad_outs) check_image(op, "grad_outs", grad, qkv);
  std::vector<Tensor> results;
  if (needs_qkv) {
    results.push_back(empty_image(qkv, qkv.size(1), format_like(qkv)));
    if (grad_outs.empty()) torch::stable::zero_(results.back());
  }
  const Tensor grad_qkv = needs_qkv ? results.back() : qkv;
  const Aggregation::Grads grads =
      aggregation.backward(grad_outs, qkv, needs_qkv ? &grad_qkv : nullptr, false, needs_weights, needs_biases);
  for (const auto* list :
       {&grads.depthwise_weights, &grads.pointwise_weights, &grads.depthwise_biases, &grads.pointwise_biases}) {
    results.insert(results.end(), list->begin(), list->end());
  }
  return results;
}

}  // namespace
}  // namespace efficientvit_kernels::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(efficientvit_kernels, m) {
  m.def(EVK_MULTISCALE_AGGREGATE_FWD);
  m.def(EVK_MULTISCALE_AGGREGATE_BWD);
}

STABLE_TORCH_LIBRARY_IMPL(efficientvit_kernels, CPU, m) {
  m.impl("multiscale_aggregate_fwd", TORCH_BOX(&efficientvit_kernels::cpu::multiscale_aggregate_fwd_cpu));
  m.impl("multiscale_aggregate_bwd", TORCH_BOX(&efficientvit_kernels::cpu::multiscale_aggregate_bwd_cpu));
}
