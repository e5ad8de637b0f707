// Launcher and registration of lite_mla in two launches.
#include <torch/csrc/stable/library.h>

#include "aggregation_weights.h"
#include "epilogue_arguments.h"
#include "lite_mla.h"
#include "lite_mla_kernels.cuh"
#include "ops.h"
#include "sum_splits.h"

namespace efficientvit_kernels::cuda {
namespace {

constexpr const char* kOp = "lite_mla_two_launches";

bool aligned_to(const Image& image, int64_t values) {
  return reinterpret_cast<uintptr_t>(image.data) % (2 * values) == 0 && image.stride_b % values == 0 &&
         image.stride_c % values == 0 && image.stride_h % values == 0;
}

// How InputTile loads x.
Access input_access(const Image& x) {
  if (access_of_rows({x}, 2) == Access::kChannels) return Access::kChannels;
  return x.stride_w == 1 && x.width % 2 == 0 && aligned_to(x, 2) ? Access::kTokens : Access::kElements;
}

const void* matrix_of(const char* arg, const Tensor& weight, const Tensor& x, int64_t rows, int64_t columns) {
  EVK_CHECK(on_device(weight) && weight.get_device_index() == x.get_device_index() &&
                weight.scalar_type() == x.scalar_type() && weight.is_contiguous() && weight.numel() == rows * columns &&
                reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0,
            kOp, arg, "contiguous, of x's dtype and GPU, aligned to 16 bytes", "another tensor");
  return weight.const_data_ptr();
}

Tensors lite_mla_two_launches(Tensor x, Tensor qkv_weight, Tensors depthwise_weights, Tensors pointwise_weights,
                              Tensor proj_weight, MaybeTensor qkv_bias, Tensors depthwise_biases,
                              Tensors pointwise_biases, MaybeTensor proj_scale, MaybeTensor proj_shift,
                              MaybeTensor residual, int64_t head_dim, double eps, bool always) {
  EVK_CHECK(on_device(x) && x.dim() == 4 && x.numel() > 0, kOp, "x", "a rank-4 GPU tensor", "another tensor");
  EVK_CHECK(qkv_weight.dim() >= 1 && proj_weight.dim() >= 1, kOp, "weights", "matrices", "scalars");
  if (depthwise_weights.size() != 1 || x.scalar_type() == ScalarType::Float) return {};
  const int64_t channels = qkv_weight.size(0), out_channels = proj_weight.size(0);
  const AggregationWeights weights(kOp, x, channels, head_dim, depthwise_weights, pointwise_weights, depthwise_biases,
                                   pointwise_biases);
  const int64_t heads = channels / (3 * head_dim), width = heads * head_dim;
  if (x.size(1) > 128 || width > 128 || out_channels > 128) return {};
  const LiteMlaShape shape{x.size(0),
                           x.size(2),
                           x.size(3),
                           static_cast<int>(x.size(1)),
                           static_cast<int>(heads),
                           static_cast<int>(head_dim),
                           static_cast<int>(out_channels),
                           weights.size(0)};
  const Launcher launch(x);
  if (!has_two_launches(shape) || !(always || prefers_two_launches(shape))) return {};
  const LiteMlaPlan plan = plan_lite_mla(shape, launch.device());
  if (!plan.fits()) return {};

  count_call();
  Tensor y = empty_image(x, out_channels);
  const auto floats = [](Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const int64_t groups = 2 * heads, numel = (head_dim + 1) * head_dim;
  Tensor states = empty_floats(x, {x.size(0), groups, plan.splits, head_dim + 1, head_dim});
  bool alike = true;
  LiteMlaArgs args{};
  args.x = image_of(x);
  args.y = image_of(y);
  args.residual = residual_of(kOp, residual, y, alike);
  args.qkv_weight = matrix_of("qkv_weight", qkv_weight, x, channels, x.size(1));
  args.proj_weight = matrix_of("proj_weight", proj_weight, x, out_channels, 2 * width);
  if (qkv_bias.has_value()) {
    EVK_CHECK(on_device(*qkv_bias) && qkv_bias->scalar_type() == x.scalar_type() && qkv_bias->is_contiguous() &&
                  qkv_bias->numel() == channels,
              kOp, "qkv_bias", "contiguous, of qkv's channels and x's dtype", "another tensor");
    args.qkv_bias = qkv_bias->const_data_ptr();
  }
  args.scale = vector_of(kOp, "proj_scale", proj_scale, y);
  args.shift = vector_of(kOp, "proj_shift", proj_shift, y);
  args.channels = shape.channels;
  args.out_channels = shape.out_channels;
  args.x_access = input_access(args.x);
  std::vector<Image> images{args.y};
  if (residual.has_value()) images.push_back(args.residual);
  args.y_access = access_of_rows(images, 2);
  weights.set(args, 0);
  args.sums = floats(states);
  args.groups = groups;
  args.heads = heads;
  args.first_group = heads;
  args.height = static_cast<int>(shape.height);
  args.width = static_cast<int>(shape.width);
  args.eps = static_cast<float>(eps);
  const LiteMlaKernels kernels =
      x.scalar_type() == ScalarType::Half ? lite_mla_fp16(head_dim, shape.size) : lite_mla_bf16(head_dim, shape.size);
  const auto run = [&](LiteMlaKernels::Kernel kernel, const AggregatePlan& tile, int64_t blocks) {
    args.tiles_x = tile.tiles_x;
    args.tiles = tile.tiles;
    args.rows = tile.rows;
    args.cols = tile.cols;
    EVK_CHECK(blocks < INT32_MAX, kOp, "B * heads * H * W", "fewer, so that there are less than 2^31 blocks", blocks);
    launch(kernel, blocks, 32 * tile.warps, tile.shared_bytes, args);
  };
  args.splits = plan.splits;
  args.tiles_per_block = plan.tiles_per_split;
  args.blocks = plan.splits;
  args.aggregated = shape.batch * heads * plan.splits;
  run(kernels.state, plan.state, args.aggregated);
  std::optional<Tensor> added_up;
  if (plan.sums_splits) {
    added_up = empty_floats(x, {x.size(0), groups, head_dim + 1, head_dim});
    sum_splits(launch, floats(states), floats(*added_up), shape.batch * groups, plan.splits, numel);
    args.splits = 1;
  }
  args.states = floats(added_up.has_value() ? *added_up : states);
  run(kernels.apply, plan.apply, shape.batch * plan.apply.tiles);
  return {y};
}

}  // namespace
}  // namespace efficientvit_kernels::cuda

EVK_CUDA_LIBRARY_IMPL(m) {
  m.impl("lite_mla_two_launches", TORCH_BOX(&efficientvit_kernels::cuda::lite_mla_two_launches));
}
