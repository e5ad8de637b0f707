// Launcher and registration of what lies between the products of lite_mla: aggregation and attention.
#include <torch/csrc/stable/library.h>

#include "aggregate_attention.h"
#include "aggregate_attention_state_kernels.cuh"
#include "aggregation_weights.h"
#include "ops.h"
#include "sum_splits.h"

namespace efficientvit_kernels::cuda {
namespace {

// Two launches per scale, and one more where there are many splits.
std::tuple<Tensor, Tensor> fused(const char* op, const Tensor& qkv, const AggregationWeights& weights, int64_t head_dim,
                                 double eps, bool channels_last) {
  const Launcher launch(qkv);
  const auto scales = static_cast<int64_t>(weights.scales());
  const int64_t batch = qkv.size(0), heads = qkv.size(1) / (3 * head_dim), groups = heads * (1 + scales);
  Tensor out = empty_image(qkv, groups * head_dim, channels_last ? MemoryFormat::ChannelsLast : format_like(qkv));
  int largest = 0;
  for (size_t s = 0; s < weights.scales(); ++s) largest = std::max(largest, weights.size(s));
  // One plan for all scales, which share the splits of the states.
  const AggregateAttentionPlan plan =
      plan_aggregate_attention(qkv.size(2), qkv.size(3), static_cast<int>(head_dim), largest, launch.device());
  EVK_CHECK(plan.state.warps > 0 && plan.apply.warps > 0, op, "the GPU", "of at least 64 KB of shared memory per block",
            launch.device().max_shared_per_block);
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  Tensor state = empty_floats(qkv, {batch, groups, head_dim + 1, head_dim});
  Tensor states = plan.splits == 1 ? state : empty_floats(qkv, {batch, groups, plan.splits, head_dim + 1, head_dim});

  AggregateAttentionArgs args{};
  args.qkv = image_of(qkv);
  args.out = image_of(out);
  args.access = access_of_rows({args.qkv}, 2);
  args.out_access = access_of_rows({args.out}, 2);
  args.sums = floats(states);
  args.groups = groups;
  args.heads = heads;
  args.height = static_cast<int>(qkv.size(2));
  args.width = static_cast<int>(qkv.size(3));
  args.eps = static_cast<float>(eps);
  const auto run = [&](AggregateAttentionKernels::Kernel AggregateAttentionKernels::* kernel, const AggregatePlan& tile,
                       int64_t tiles_per_block, auto shared_bytes) {
    args.tiles_x = tile.tiles_x;
    args.tiles = tile.tiles;
    args.rows = tile.rows;
    args.cols = tile.cols;
    args.tiles_per_block = tiles_per_block;
    args.blocks = ceil_div(tile.tiles, tiles_per_block);
    args.aggregated = batch * heads * args.blocks;
    for (size_t s = 0; s < weights.scales(); ++s) {
      weights.set(args, s);
      args.first_group = heads * (1 + static_cast<int64_t>(s));
      const int64_t blocks = args.aggregated * (s == 0 ? 2 : 1);
      EVK_CHECK(blocks < INT32_MAX, op, "B * heads * H * W", "fewer, so that there are less than 2^31 blocks", blocks);
      const AggregateAttentionKernels kernels = qkv.scalar_type() == ScalarType::Half
                                                    ? aggregate_attention_fp16(head_dim, weights.size(s))
                                                    : aggregate_attention_bf16(head_dim, weights.size(s));
      launch(kernels.*kernel, blocks, 32 * tile.warps,
             shared_bytes(tile.rows, tile.cols, static_cast<int>(head_dim), weights.size(s)), args);
    }
  };
  args.splits = plan.splits;
  run(&AggregateAttentionKernels::state, plan.state, plan.tiles_per_split, aggregate_state_shared_bytes);
  if (plan.sums_splits) {
    sum_splits(launch, floats(states), floats(state), batch * groups, plan.splits, (head_dim + 1) * head_dim);
  }
  const bool added_up = plan.sums_splits || plan.splits == 1;
  args.states = floats(added_up ? state : states);
  args.splits = added_up ? 1 : plan.splits;
  args.state = added_up ? nullptr : floats(state);
  run(&AggregateAttentionKernels::apply, plan.apply, 1, aggregate_apply_shared_bytes);
  return {out, state};
}

}  // namespace

// The attention of qkv and of its aggregation at every scale, and its state. With `channels_last` the fused kernels
// write the attention with its channels side by side, whatever qkv's format is.
std::tuple<Tensor, Tensor> aggregate_attention_fwd(Tensor qkv, Tensors depthwise_weights, Tensors pointwise_weights,
                                                   Tensors depthwise_biases, Tensors pointwise_biases, int64_t head_dim,
                                                   double eps, bool channels_last) {
  const char* op = "aggregate_attention";
  const AggregationWeights weights(op, qkv, head_dim, depthwise_weights, pointwise_weights, depthwise_biases,
                                   pointwise_biases);
  const int bytes = qkv.scalar_type() == ScalarType::Float ? 4 : 2;
  if (weights.scales() > 0 && qkv.numel() > 0 && has_aggregate_attention(head_dim, bytes)) {
    count_call();
    return fused(op, qkv, weights, head_dim, eps, channels_last);
  }
  Tensors scales = multiscale_aggregate_fwd(qkv, weights.depthwise, weights.pointwise, weights.depthwise_bias,
                                            weights.pointwise_bias, head_dim);
  scales.insert(scales.begin(), qkv);
  return relu_linear_attention_fwd(scales, head_dim, eps);
}

}  // namespace efficientvit_kernels::cuda

EVK_CUDA_LIBRARY_IMPL(m) {
  m.impl("aggregate_attention_fwd", TORCH_BOX(&efficientvit_kernels::cuda::aggregate_attention_fwd));
}
