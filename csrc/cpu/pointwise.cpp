// 1 x 1 convolutions on the CPU: packing, cutting into tasks.
#include "pointwise.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "plan.h"
#include "pointwise_launch.h"

namespace efficientvit_kernels::cpu {
namespace {

// Bytes that one block of packed columns may take: it is read once per row panel and should stay in a second-level
// cache.
constexpr int64_t kBlockBytes = 256 << 10;
constexpr int64_t kMaxBlockColumns = 256;
// A block of fewer columns would read the packed weights, from a third-level cache, too often.
constexpr int64_t kMinBlockColumns = 128;
// Up to this size all columns of a batch make one block.
constexpr int64_t kStreamBytes = 3 << 19;
constexpr int64_t kGradChunk = 512;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool is_dense(const Tensor& image) {
  const int64_t C = image.size(1), H = image.size(2), W = image.size(3);
  const int64_t nchw[] = {C * H * W, H * W, W, 1}, channels_last[] = {C * H * W, 1, W * C, C};
  bool is_nchw = true, is_channels_last = true;
  for (int64_t axis = 0; axis < 4; ++axis) {
    if (image.size(axis) == 1) continue;
    is_nchw &= image.stride(axis) == nchw[axis];
    is_channels_last &= image.stride(axis) == channels_last[axis];
  }
  return is_nchw || is_channels_last;
}

Tensor dense(const Tensor& image) { return is_dense(image) ? image : as_contiguous(image); }

// As image_of, but axes of size 1 get the strides of one of the two dense formats.
static ImageTensor dense_image_of(const Tensor& t) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const bool channels_last = C > 1 && H * W > 1 && t.stride(1) == 1;
  if (channels_last) return {data_of(t), C * H * W, 1, W * C, C};
  return {data_of(t), C * H * W, H * W, W, 1};
}

static PointwiseArgs args_of(const PointwiseWeight& weight, const void* in_scale) {
  PointwiseArgs args{};
  args.weight = weight.data;
  args.stride_m = weight.stride_m;
  args.stride_k = weight.stride_k;
  args.out_channels = weight.out_channels;
  args.in_channels = weight.in_channels;
  args.in_scale = in_scale;
  return args;
}

PackedWeight::PackedWeight(const PointwiseWeight& weight, StorageType type, const void* in_scale)
    : args_(args_of(weight, in_scale)),
      kernels_(pointwise_kernels_in_use(type)),
      bytes_(type == StorageType::kDouble ? 8 : 4),
      panels_(ceil_div(weight.out_channels, kernels_.panel_rows)),
      panel_bytes_(kernels_.packed_rows_numel(kernels_.panel_rows, weight.in_channels) * bytes_),
      buffer_(1) {
  const bool is_compute_type = type == StorageType::kDouble || type == StorageType::kFloat;
  // Rows whole pages apart would fall into the same set of a first-level cache.
  const bool apart = weight.stride_m * bytes_ % 4096 != 0;
  reads_in_place_ = is_compute_type && weight.stride_k == 1 && in_scale == nullptr && apart;
}

void PackedWeight::pack_all() {
  buffer_ = Buffer(at_least(1, panels_ * panel_bytes_));
  torch::stable::parallel_for(0, panels_, grain_size(kernels_.panel_rows * args_.in_channels * 16),
                              [&](int64_t begin, int64_t end) {
                                const StageTimer timer(Stage::kPackWeights);
                                pack(begin, end, at(begin));
                              });
}

WeightRows PackedWeight::rows_for(int64_t p0, int64_t p1, void* memory) const {
  if (reads_in_place_) {
    const int64_t first = args_.out_channels * p0 / panels_;
    char* weight = const_cast<char*>(static_cast<const char*>(args_.weight));
    return {weight + first * args_.stride_m * bytes_, args_.stride_m};
  }
  const StageTimer timer(Stage::kPackWeights);
  pack(p0, p1, memory);
  return {memory, 0};
}

void PackedWeight::pack(int64_t p0, int64_t p1, void* into) const {
  kernels_.pack_rows(args_, {0, p0, p1, 0, 0, {into, 0}, nullptr});
}

void pointwise(const Tensor& in, const PointwiseWeight& weight, const PointwiseEpilogue& epilogue, const Tensor& out,
               Stage stage) {
  const StorageType type = storage_type(in, "pointwise", "in");
  const PointwiseKernels kernels = pointwise_kernels_in_use(type);
  const int64_t batch = in.size(0), tokens = in.size(2) * in.size(3), bytes = compute_bytes(in);
  if (batch == 0 || tokens == 0 || weight.out_channels == 0) return;
  PointwiseArgs args = args_of(weight, epilogue.in_scale);
  args.in = dense_image_of(in);
  args.out = dense_image_of(out);
  if (epilogue.residual != nullptr) args.residual = dense_image_of(*epilogue.residual);
  args.scale = epilogue.scale;
  args.shift = epilogue.shift;
  args.height = in.size(2);
  args.width = in.size(3);
  PackedWeight packed(weight, type, epilogue.in_scale);

  const int64_t rows = packed.panels(), cols = ceil_div(tokens, kernels.panel_cols);
  const int64_t panel_bytes = kernels.packed_cols_numel(kernels.panel_cols, args.in_channels) * bytes;
  if (batch * cols * panel_bytes <= kStreamBytes) {
    // All columns are packed at once, and stay in a second-level cache while the weights stream through, once.
    const Buffer packed_cols(at_least(1, batch * cols * panel_bytes));
    auto cols_of = [&](int64_t i) { return static_cast<char*>(packed_cols.data) + i * panel_bytes; };
    const int64_t scratch_bytes = kernels.scratch_bytes(cols * kernels.panel_cols, kStreamPanels);
    torch::stable::parallel_for(
        0, batch * cols, grain_size(args.in_channels * kernels.panel_cols * 8), [&](int64_t begin, int64_t end) {
          void* scratch = thread_scratch(scratch_bytes);
          const StageTimer timer(stage);
          for (int64_t i = begin; i < end; ++i) {
            kernels.pack_cols(args, {i / cols, 0, 0, i % cols, i % cols + 1, {}, cols_of(i)}, scratch);
          }
        });
    packed.for_each_group(grain_size(2 * batch * tokens * args.in_channels * kernels.panel_rows * kStreamPanels),
                          scratch_bytes, stage,
                          [&](int64_t p0, int64_t p1, const WeightRows& weight_rows, void* scratch) {
                            for (int64_t b = 0; b < batch; ++b) {
                              kernels.multiply(args, {b, p0, p1, 0, cols, weight_rows, cols_of(b * cols)}, scratch);
                            }
                          });
    return;
  }
  packed.pack_all();
  int64_t wanted = at_least(kMinBlockColumns / kernels.panel_cols, kBlockBytes / panel_bytes);
  if (wanted > kMaxBlockColumns / kernels.panel_cols) wanted = kMaxBlockColumns / kernels.panel_cols;
  const int64_t blocks = ceil_div(cols, wanted);
  const int64_t block_cols = ceil_div(cols, blocks);
  const int64_t packed_bytes = (block_cols * panel_bytes + 63) / 64 * 64;
  const int64_t scratch_bytes = kernels.scratch_bytes(block_cols * kernels.panel_cols, rows);
  const int64_t flops = 2 * block_cols * kernels.panel_cols * args.in_channels * args.out_channels;
  torch::stable::parallel_for(0, batch * blocks, grain_size(flops), [&](int64_t begin, int64_t end) {
    char* packed_cols = static_cast<char*>(thread_scratch(packed_bytes + scratch_bytes));
    const StageTimer timer(stage);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i % blocks, b = i / blocks;
      const PointwiseTask task{
          b, 0, rows, cols * block / blocks, cols * (block + 1) / blocks, {packed.at(0), 0}, packed_cols};
      kernels.pack_cols(args, task, packed_cols + packed_bytes);
      kernels.multiply(args, task, packed_cols + packed_bytes);
    }
  });
}

WeightGrad pointwise_weight_grad(const Tensor& grad_out, const Tensor& in, const Tensor& into) {
  const PointwiseKernels grad_kernels = pointwise_kernels_in_use(storage_type(grad_out, "pointwise", "grad_out"));
  const PointwiseKernels kernels = pointwise_kernels_in_use(storage_type(in, "pointwise", "in"));
  const int64_t batch = in.size(0), tokens = in.size(2) * in.size(3), bytes = compute_bytes(in);
  PointwiseGradArgs args{};
  args.grad_out = dense_image_of(grad_out);
  args.in = dense_image_of(in);
  args.out_channels = grad_out.size(1);
  args.in_channels = in.size(1);
  args.height = in.size(2);
  args.width = in.size(3);
  const int64_t rows = ceil_div(args.out_channels, kernels.panel_rows);
  const int64_t cols = ceil_div(args.in_channels, kernels.panel_cols), ld = cols * kernels.panel_cols;
  // Straight into a gradient of the compute type whose rows are whole panels.
  const bool direct = into.scalar_type() == compute_type(in) && ld == args.in_channels;
  WeightGrad result{Buffer(direct ? 1 : at_least(1, args.out_channels * ld * bytes)), nullptr, ld};
  result.values = args.grad_weight = direct ? data_of(into) : result.buffer.data;
  if (batch == 0 || tokens == 0) {
    std::memset(args.grad_weight, 0, args.out_channels * ld * bytes);
    return result;
  }
  const int64_t chunks = ceil_div(tokens, kGradChunk), chunk = ceil_div(tokens, chunks);
  const Buffer packed_grad(at_least(1, kernels.packed_rows_numel(args.out_channels, chunk) * bytes));
  const Buffer packed_in(at_least(1, kernels.packed_cols_numel(args.in_channels, chunk) * bytes));
  args.packed_grad = packed_grad.data;
  args.packed_in = packed_in.data;
  args.first = true;
  for (args.b = 0; args.b < batch; ++args.b) {
    for (int64_t c = 0; c < chunks; ++c) {
      args.n0 = tokens * c / chunks;
      args.count = tokens * (c + 1) / chunks - args.n0;
      const int64_t cost = 16 * args.count;
      torch::stable::parallel_for(0, rows + cols, grain_size(cost * kernels.panel_cols),
                                  [&](int64_t begin, int64_t end) {
                                    const StageTimer timer(Stage::kWeightGrad);
                                    if (begin < rows) grad_kernels.pack_grad(args, begin, end < rows ? end : rows);
                                    if (end <= rows) return;
                                    void* scratch = thread_scratch(kernels.scratch_numel * bytes);
                                    kernels.pack_in(args, at_least(begin, rows) - rows, end - rows, scratch);
                                  });
      torch::stable::parallel_for(0, rows, grain_size(2 * args.count * ld * kernels.panel_rows),
                                  [&](int64_t begin, int64_t end) {
                                    const StageTimer timer(Stage::kWeightGrad);
                                    kernels.accumulate(args, begin, end);
                                  });
      args.first = false;
    }
  }
  return result;
}

template <class T>
static std::vector<double> sums_of(const Tensor& image) {
  const ImageTensor view = dense_image_of(image);
  const int64_t batch = image.size(0), channels = image.size(1), tokens = image.size(2) * image.size(3);
  std::vector<double> sums(channels, 0.0);
  const T* data = static_cast<const T*>(view.data);
  // Token n of an image goes to chain n % 8, whatever the layout: the chains overlap, and the bits do not depend on it.
  constexpr int64_t kChains = 8;
  const int64_t stride_n = view.stride_w, stride_c = view.stride_c;
  torch::stable::parallel_for(0, channels, grain_size(batch * tokens * 4), [&](int64_t begin, int64_t end) {
    std::vector<double> chains(kChains * (end - begin), 0.0);
    for (int64_t b = 0; b < batch; ++b) {
      const T* first = data + b * view.stride_b;
      if (stride_n != 1) {
        for (int64_t n = 0; n < tokens; ++n) {
          double* chain = chains.data() + n % kChains * (end - begin);
          for (int64_t c = begin; c < end; ++c) chain[c - begin] += static_cast<double>(first[n * stride_n + c]);
        }
        continue;
      }
      for (int64_t c = begin; c < end; ++c) {
        const T* row = first + c * stride_c;
        double partial[kChains];
        for (int64_t i = 0; i < kChains; ++i) partial[i] = chains[i * (end - begin) + c - begin];
        int64_t n = 0;
        for (; n + kChains <= tokens; n += kChains) {
          for (int64_t i = 0; i < kChains; ++i) partial[i] += static_cast<double>(row[n + i]);
        }
        for (int64_t i = 0; n + i < tokens; ++i) partial[i] += static_cast<double>(row[n + i]);
        for (int64_t i = 0; i < kChains; ++i) chains[i * (end - begin) + c - begin] = partial[i];
      }
    }
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t i = 0; i < kChains; ++i) sums[c] += chains[i * (end - begin) + c - begin];
    }
  });
  return sums;
}

std::vector<double> channel_sums(const Tensor& image) {
  switch (storage_type(image, "channel_sums", "image")) {
    case StorageType::kDouble:
      return sums_of<double>(image);
    case StorageType::kHalf:
      return sums_of<torch::headeronly::Half>(image);
    case StorageType::kBFloat16:
      return sums_of<torch::headeronly::BFloat16>(image);
    default:
      return sums_of<float>(image);
  }
}

}  // namespace efficientvit_kernels::cpu
