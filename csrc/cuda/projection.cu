// Launchers and registration of lite_mla's projection: a product with its epilogue, and the epilogue alone.
#include <torch/csrc/stable/library.h>

#include "epilogue_arguments.h"
#include "epilogue_kernels.cuh"
#include "projection_kernels.cuh"

namespace efficientvit_kernels::cuda {
namespace {

void projection_epilogue(Tensor y, MaybeTensor scale, MaybeTensor shift, MaybeTensor residual) {
  const char* op = "projection_epilogue";
  const ScalarType type = y.scalar_type();
  EVK_CHECK(on_device(y) && y.dim() == 4, op, "y", "a rank-4 GPU tensor", "another tensor");
  EVK_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 || type == ScalarType::Float, op, "y",
            "float16, bfloat16 or float32", "another dtype");
  bool alike = true;
  EpilogueArgs args{};
  args.y = image_of(y);
  args.scale = vector_of(op, "scale", scale, y);
  args.shift = vector_of(op, "shift", shift, y);
  args.residual = residual_of(op, residual, y, alike);
  args.channels = y.size(1);
  args.tokens = y.size(2) * y.size(3);
  args.count = y.numel();
  if (args.count == 0) return;
  const int64_t vector = type == ScalarType::Float ? 4 : 8;
  args.channels_last = !y.is_contiguous();
  bool gapless = y.is_contiguous();
  if (args.channels_last) {
    gapless = args.y.stride_c == 1 && args.y.stride_w == args.channels && args.y.flat &&
              (y.size(0) == 1 || args.y.stride_b == args.tokens * args.channels);
  }
  const auto aligned = [](const Image& image) { return reinterpret_cast<uintptr_t>(image.data) % 16 == 0; };
  args.dense = alike && gapless && aligned(args.y) && aligned(args.residual) &&
               (args.channels_last ? args.channels : args.tokens) % vector == 0;
  const Launcher launch(y);
  const int64_t blocks = ceil_div(args.dense ? args.count / vector : args.count, kThreads);
  EVK_CHECK(blocks < INT32_MAX, op, "y", "smaller, so that there are less than 2^31 blocks", blocks);
  launch(type == ScalarType::Float  ? epilogue_kernel<float>
         : type == ScalarType::Half ? epilogue_kernel<__half>
                                    : epilogue_kernel<__nv_bfloat16>,
         blocks, kThreads, 0, args);
}

// y = scale * (W x) + shift + residual into `y`, x [B, C, H, W] with its channels side by side.
void projection(Tensor weight, Tensor x, MaybeTensor scale, MaybeTensor shift, MaybeTensor residual, Tensor y) {
  const char* op = "projection";
  const ScalarType type = y.scalar_type();
  EVK_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, op, "y", "float16 or bfloat16", "another dtype");
  EVK_CHECK(on_device(y) && y.dim() == 4, op, "y", "a rank-4 GPU tensor", "another tensor");
  const int64_t channels = x.dim() == 4 ? x.size(1) : 0, tokens = y.size(2) * y.size(3);
  EVK_CHECK(on_device(x) && x.scalar_type() == type && channels > 0 && channels % 8 == 0 && x.size(0) == y.size(0) &&
                x.size(2) == y.size(2) && x.size(3) == y.size(3),
            op, "x", "[B, C, H, W] of y's dtype with a C that is a multiple of 8", "another tensor");
  EVK_CHECK(on_device(weight) && weight.scalar_type() == type && weight.is_contiguous() &&
                weight.numel() == y.size(1) * channels,
            op, "weight", "contiguous [O, C] of y's dtype", "another tensor");
  if (y.numel() == 0) return;
  const Image image = image_of(x);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  EVK_CHECK(image.stride_c == 1 && (tokens == 1 || image.stride_w == channels) && image.flat &&
                (x.size(0) == 1 || image.stride_b == tokens * channels) && aligned(image.data) &&
                aligned(weight.const_data_ptr()),
            op, "x and weight", "without gaps, channels side by side, aligned to 16 bytes", "others");
  bool alike = true;
  ProjectionArgs args{};
  args.x = image.data;
  args.weight = weight.const_data_ptr();
  args.scale = vector_of(op, "scale", scale, y);
  args.shift = vector_of(op, "shift", shift, y);
  args.residual = residual_of(op, residual, y, alike);
  args.y = image_of(y);
  args.channels = channels;
  args.out_channels = y.size(1);
  args.tokens = tokens;
  args.count = y.size(0) * tokens;
  std::vector<Image> images{args.y};
  if (residual.has_value()) images.push_back(args.residual);
  args.access = access_of(images, tokens);
  if (args.access == Access::kChannels && args.out_channels % 8 != 0) args.access = Access::kElements;
  const Launcher launch(y);
  const ProjectionPlan plan = plan_projection(args.out_channels, args.count, launch.device());
  args.row_blocks = plan.row_blocks;
  EVK_CHECK(plan.blocks < INT32_MAX, op, "y", "smaller, so that there are less than 2^31 blocks", plan.blocks);
  const bool half = type == ScalarType::Half;
  launch(plan.tokens == 64 ? (half ? projection_kernel<__half, 64> : projection_kernel<__nv_bfloat16, 64>)
                           : (half ? projection_kernel<__half, 32> : projection_kernel<__nv_bfloat16, 32>),
         plan.blocks, kThreads, plan.shared_bytes, args);
}

}  // namespace
}  // namespace efficientvit_kernels::cuda

EVK_CUDA_LIBRARY_IMPL(m) {
  m.impl("projection_epilogue", TORCH_BOX(&efficientvit_kernels::cuda::projection_epilogue));
  m.impl("projection", TORCH_BOX(&efficientvit_kernels::cuda::projection));
}
