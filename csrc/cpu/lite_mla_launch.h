// One call of lite_mla: its checked weights, and the way from qkv to y. Shared by the forward and the backward.
#pragma once

#include "lite_mla.h"
#include "multiscale_aggregate_launch.h"
#include "pointwise_launch.h"

namespace efficientvit_kernels::cpu {

// Bytes that the packed input of the projection may take for one tile.
inline constexpr int64_t kTileBytes = 1 << 20;
// Up to this size the projection's input is packed for the whole batch at once.
inline constexpr int64_t kProjectionStreamBytes = 1 << 20;

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

inline Tensor as_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? as_contiguous(t) : as_contiguous(torch::stable::to(t, type));
}

// Checked weights of one call.
struct Block {
  Block(const char* op, const Tensor& x, const Tensor& qkv_weight, const Tensors& depthwise_weights,
        const Tensors& pointwise_weights, const Tensor& proj_weight, const MaybeTensor& qkv_bias,
        const Tensors& depthwise_biases, const Tensors& pointwise_biases, int64_t head_dim, double eps)
      : head_dim(head_dim),
        eps(eps),
        channels(check(op, x, qkv_weight, head_dim)),
        heads(channels / (3 * head_dim)),
        qkv_weight(PointwiseWeight::of(qkv_weight)),
        proj_weight(PointwiseWeight::of(proj_weight)),
        aggregation(op, x, channels, head_dim, depthwise_weights, pointwise_weights, depthwise_biases,
                    pointwise_biases) {
    const int64_t groups = heads * (1 + aggregation.num_scales());
    EVK_CHECK(proj_weight.is_cpu() && proj_weight.scalar_type() == x.scalar_type() && proj_weight.dim() == 4 &&
                  proj_weight.size(1) == groups * head_dim &&
                  proj_weight.numel() == proj_weight.size(0) * groups * head_dim,
              op, "proj_weight", "[C_out, heads * (1 + scales) * head_dim, 1, 1] of x's dtype", "another tensor");
    if (qkv_bias.has_value()) {
      EVK_CHECK(qkv_bias->is_cpu() && qkv_bias->numel() == channels && qkv_bias->scalar_type() == x.scalar_type(), op,
                "qkv_bias", "[3T] of x's dtype", "another tensor");
      bias = as_type(*qkv_bias, compute_type(x));
    }
  }

  static int64_t check(const char* op, const Tensor& x, const Tensor& qkv_weight, int64_t head_dim) {
    EVK_CHECK(head_dim > 0, op, "head_dim", "positive", head_dim);
    EVK_CHECK(x.is_cpu() && x.dim() == 4, op, "x", "a rank-4 CPU tensor", "another tensor");
    EVK_CHECK(qkv_weight.is_cpu() && qkv_weight.scalar_type() == x.scalar_type() && qkv_weight.dim() == 4 &&
                  qkv_weight.size(1) == x.size(1) && qkv_weight.numel() == qkv_weight.size(0) * x.size(1) &&
                  qkv_weight.size(0) % (3 * head_dim) == 0,
              op, "qkv_weight", "[heads * 3 * head_dim, C, 1, 1] of x's dtype", "another tensor");
    return qkv_weight.size(0);
  }

  Tensor qkv(const Tensor& x) const {
    Tensor out = empty_image(x, channels, MemoryFormat::Contiguous);
    PointwiseEpilogue epilogue;
    if (bias.has_value()) epilogue.shift = data_of(*bias);
    pointwise(x, qkv_weight, epilogue, out, Stage::kQkvProduct);
    return out;
  }

  Tensor empty_state(const Tensor& x, int64_t leading) const {
    const int64_t sizes[] = {leading, heads * (1 + aggregation.num_scales()), head_dim + 1, head_dim};
    return torch::stable::empty(sizes, compute_type(x), std::nullopt, x.device());
  }

  int64_t head_dim;
  double eps;
  int64_t channels, heads;
  PointwiseWeight qkv_weight, proj_weight;
  Aggregation aggregation;
  MaybeTensor bias;
};

// From qkv to y. Without y, only the state.
class Attend {
 public:
  Attend(const Block& block, const Tensor& qkv, const Tensor& state)
      : qkv_(qkv),
        type_(storage_type(qkv, "lite_mla", "x")),
        kernels_(lite_mla_kernels_in_use(type_)),
        batch_(qkv.size(0)),
        bytes_(compute_bytes(qkv)),
        grid_(qkv.size(2), qkv.size(3), aggregate_tokens(qkv.size(3))) {
    args_.qkv = image_of(qkv);
    args_.scales = block.aggregation.scales().data();
    args_.num_scales = block.aggregation.num_scales();
    args_.heads = block.heads;
    args_.head_dim = block.head_dim;
    args_.height = qkv.size(2);
    args_.width = qkv.size(3);
    args_.eps = block.eps;
    args_.state = data_of(state);
    const int64_t tiles_per_chunk = at_least(1, chunk_tokens(block.head_dim) / aggregate_tokens(qkv.size(3)));
    chunks_ = (grid_.tiles() + tiles_per_chunk - 1) / tiles_per_chunk;
    partial_ = block.empty_state(qkv, (chunks_ - 1) * batch_);
    args_.partial = data_of(partial_);
  }

  void state_only() {
    sum_states();
    for_each_group([&](int64_t b, int64_t g, void* scratch) { kernels_.finish(args_, b, g, scratch); });
  }

  void project(const PointwiseWeight& weight, const PointwiseEpilogue& epilogue, const Tensor& y) {
    args_.y = image_of(y);
    if (epilogue.residual != nullptr) args_.residual = image_of(*epilogue.residual);
    args_.scale = epilogue.scale;
    args_.shift = epilogue.shift;
    args_.out_channels = weight.out_channels;
    const int64_t K = args_.width_k(), tokens = args_.height * args_.width;
    int64_t tile_tokens = kTileBytes / (K * bytes_);
    const int64_t most = aggregate_tokens(args_.width);
    if (tile_tokens > most) tile_tokens = most;
    const TileGrid grid(args_.height, args_.width, at_least(64, tile_tokens));
    PackedWeight packed(weight, type_, nullptr);
    const int64_t packed_bytes = kernels_.packed_cols_numel(max_tokens(grid), K) * bytes_;
    // The fold costs C_out * D products a group and image, and saves D a group and token.
    const bool fold = tokens >= 2 * weight.out_channels;
    if (!fold && batch_ * grid.tiles() * packed_bytes <= kProjectionStreamBytes) {
      project_in_two_steps(packed, grid, packed_bytes);
      return;
    }
    packed.pack_all();
    args_.packed = packed.at(0);
    args_.folded_numel = (packed.at(packed.panels()) - packed.at(0)) / bytes_;
    const Buffer folded(fold ? batch_ * args_.folded_numel * bytes_ : 1);
    args_.folded = fold ? folded.data : nullptr;
    project_tile_by_tile(packed, grid, packed_bytes);
  }

 private:
  static int64_t max_tokens(const TileGrid& grid) {
    return ((grid.height + grid.down_rows - 1) / grid.down_rows) *
           ((grid.width + grid.down_columns - 1) / grid.down_columns);
  }
  static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

  int64_t flops_per_group() const { return 4 * args_.head_dim * args_.head_dim * args_.height * args_.width; }
  int64_t scratch_bytes(const TileGrid& grid) const {
    const int64_t a = kernels_.scratch_bytes(args_, grid_), b = kernels_.scratch_bytes(args_, grid);
    return rounded(a > b ? a : b);
  }

  void* sum_of(int64_t b, int64_t g, int64_t chunk) const {
    const int64_t pair = b * args_.groups() + g, pairs = batch_ * args_.groups(), numel = args_.state_numel() * bytes_;
    return chunk == 0 ? static_cast<char*>(args_.state) + pair * numel
                      : static_cast<char*>(args_.partial) + ((chunk - 1) * pairs + pair) * numel;
  }

  template <class Body>
  void for_each_group(Body body) const {
    const int64_t groups = args_.groups(), bytes = scratch_bytes(grid_);
    torch::stable::parallel_for(0, batch_ * groups, grain_size(flops_per_group()), [&](int64_t begin, int64_t end) {
      void* scratch = thread_scratch(bytes);
      const StageTimer timer(Stage::kFinishState);
      for (int64_t i = begin; i < end; ++i) body(i / groups, i % groups, scratch);
    });
  }

  // The sums over all tokens, unfinished.
  void sum_states() const {
    const int64_t groups = args_.groups(), bytes = scratch_bytes(grid_), tiles = grid_.tiles();
    torch::stable::parallel_for(
        0, batch_ * groups * chunks_, grain_size(flops_per_group() / chunks_), [&](int64_t begin, int64_t end) {
          void* scratch = thread_scratch(bytes);
          const StageTimer timer(Stage::kState);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t chunk = i % chunks_, g = i / chunks_ % groups, b = i / chunks_ / groups;
            kernels_.state(args_, grid_, b, g, tiles * chunk / chunks_, tiles * (chunk + 1) / chunks_,
                           sum_of(b, g, chunk), scratch);
          }
        });
    if (chunks_ > 1) {
      const int64_t numel = batch_ * groups * args_.state_numel();
      bytes_ == 8
          ? reduce_chunks(static_cast<double*>(args_.state), static_cast<double*>(args_.partial), numel, chunks_)
          : reduce_chunks(static_cast<float*>(args_.state), static_cast<float*>(args_.partial), numel, chunks_);
    }
  }

  // A small batch: first the projection's input for all of it, then the weights stream through.
  void project_in_two_steps(const PackedWeight& weight, const TileGrid& grid, int64_t packed_bytes) const {
    const int64_t tiles = grid.tiles(), bytes = scratch_bytes(grid);
    const Buffer all(batch_ * tiles * packed_bytes);
    auto packed_of = [&](int64_t b, int64_t tile) {
      return static_cast<char*>(all.data) + (b * tiles + tile) * packed_bytes;
    };
    if (chunks_ > 1) sum_states();
    const int64_t groups = args_.groups();
    torch::stable::parallel_for(0, batch_ * groups, grain_size(2 * flops_per_group()), [&](int64_t begin, int64_t end) {
      void* scratch = thread_scratch(bytes);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / groups, g = i % groups;
        if (chunks_ == 1) {
          const StageTimer timer(Stage::kState);
          kernels_.state(args_, grid_, b, g, 0, grid_.tiles(), sum_of(b, g, 0), scratch);
        }
        {
          const StageTimer timer(Stage::kFinishState);
          kernels_.finish(args_, b, g, scratch);
        }
        const StageTimer timer(Stage::kQuery);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          kernels_.query(args_, grid, b, g, tile, packed_of(b, tile), scratch);
        }
      }
    });
    const int64_t flops = 2 * args_.height * args_.width * args_.width_k() * args_.out_channels;
    weight.for_each_group(grain_size(batch_ * flops * kStreamPanels / weight.panels()),
                          kernels_.project_bytes(args_, grid, kStreamPanels), Stage::kProjection,
                          [&](int64_t p0, int64_t p1, const WeightRows& rows, void* scratch) {
                            for (int64_t i = 0; i < batch_ * tiles; ++i) {
                              kernels_.project(args_, grid, i / tiles, i % tiles, p0, p1, rows,
                                               packed_of(i / tiles, i % tiles), scratch);
                            }
                          });
  }

  void project_tile_by_tile(const PackedWeight& weight, const TileGrid& grid, int64_t packed_bytes) const {
    sum_states();
    for_each_group([&](int64_t b, int64_t g, void* scratch) { kernels_.finish(args_, b, g, scratch); });
    const int64_t tiles = grid.tiles(), query_bytes = scratch_bytes(grid);
    const int64_t project_bytes = rounded(kernels_.project_bytes(args_, grid, weight.panels()));
    torch::stable::parallel_for(0, batch_ * tiles, 1, [&](int64_t begin, int64_t end) {
      char* scratch = static_cast<char*>(thread_scratch(query_bytes + project_bytes + packed_bytes));
      char* packed = scratch + query_bytes + project_bytes;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / tiles, tile = i % tiles;
        {
          const StageTimer timer(Stage::kQuery);
          for (int64_t g = 0; g < args_.groups(); ++g) kernels_.query(args_, grid, b, g, tile, packed, scratch);
        }
        const StageTimer timer(Stage::kProjection);
        char* rows = args_.folded ? static_cast<char*>(args_.folded) + b * args_.folded_numel * bytes_ : weight.at(0);
        kernels_.project(args_, grid, b, tile, 0, weight.panels(), {rows, 0}, packed, scratch + query_bytes);
      }
    });
  }

  Tensor qkv_, partial_;
  StorageType type_;
  LiteMlaKernels kernels_;
  LiteMlaArgs args_{};
  int64_t batch_, bytes_, chunks_ = 1;
  TileGrid grid_;
};

inline Tensor compute_vector(const char* op, const char* arg, const MaybeTensor& vector, const Tensor& x,
                             int64_t size) {
  EVK_CHECK(vector->is_cpu() && vector->dim() == 1 && vector->numel() == size, op, arg, "[C_out] on the CPU",
            "another tensor");
  return as_type(*vector, compute_type(x));
}

}  // namespace efficientvit_kernels::cpu
