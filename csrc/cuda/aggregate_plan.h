// How multiscale_aggregate is laid out on a GPU; see launch_plan.h.
#pragma once

#include "launch_plan.h"

namespace efficientvit_kernels::cuda {

constexpr bool has_kernel_size(int64_t size) { return size == 3 || size == 5 || size == 7; }

// body(K) with the kernel size at hand as a compile-time constant.
template <class Body>
auto for_kernel_size(int64_t size, Body body) {
  switch (size) {
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 5:
      return body(std::integral_constant<int, 5>{});
    default:
      return body(std::integral_constant<int, 7>{});
  }
}

// Neighbouring pixels of a row that a lane convolves at once: at D = 64 the products of 8 would take 128 registers.
constexpr int lane_pixels(int head_dim) { return head_dim <= 32 ? 8 : 4; }

// Channels of the middle, the gradient of the depthwise convolution's result, that a block of the backward computes.
constexpr int kChunk = 8;

// A row of taps in shared memory, aligned to 16 bytes.
constexpr int tap_pitch(int size) { return size == 3 ? 4 : 8; }

// Columns left and right of a tile: 16 bytes, so that aligned rows of an image are aligned rows of a tile.
constexpr int halo_margin(int bytes) { return 16 / bytes; }
constexpr int halo_pitch(int cols, int margin) { return cols + 2 * margin; }
// Values from a channel of a tile to the next: so many words that lanes which read 16 bytes each of neighbouring
// channels use different banks, `bank` (8 or 4) apart.
constexpr int halo_plane(int rows, int cols, int size, int margin, int bytes, int bank) {
  const int words = (rows + size - 1) * halo_pitch(cols, margin) * bytes / 4;
  return (words + (bank - words % 32 + 32) % 32) * 4 / bytes;
}
// The same of a tile without a halo.
constexpr int tile_plane(int pixels, int bytes) { return pixels + 32 / bytes; }

struct AggregatePlan {
  int warps;
  int rows, cols;  // of a tile
  int64_t tiles_x, tiles;
  int64_t shared_bytes;
};

// Bytes of shared memory of a forward tile, in the order in which the kernel lays them out.
constexpr int64_t aggregate_shared_bytes(int rows, int cols, int head_dim, int size, int bytes) {
  const int64_t d = head_dim, floats = 4;
  const int64_t weights = d * d * floats, taps = d * size * tap_pitch(size) * floats, biases = 2 * d * floats;
  const int64_t halo = d * halo_plane(rows, cols, size, halo_margin(bytes), bytes, 8) * bytes;
  const int64_t hidden = bytes == 4 ? d * tile_plane(rows * cols, 4) * floats : 0;
  return weights + taps + biases + halo + hidden;
}

// The same of a tile of the backward.
constexpr int64_t aggregate_grad_shared_bytes(int rows, int cols, int head_dim, int size, int bytes) {
  const int64_t d = head_dim, floats = 4;
  const int64_t taps = 2 * kChunk * size * tap_pitch(size) * floats, weights = bytes == 4 ? kChunk * d * floats : 0;
  const int margin = halo_margin(bytes);
  const int64_t grad = d * halo_plane(rows, cols, size, margin, bytes, 8) * bytes;
  const int64_t x = kChunk * halo_plane(rows, cols, size, margin, bytes, 4) * bytes;
  const int64_t middle = kChunk * halo_plane(rows, cols, size, margin, 4, 4) * floats;
  const int64_t hidden = kChunk * tile_plane(rows * cols, 4) * floats;
  const int64_t staged = kChunk * tile_plane(rows * cols, bytes) * bytes;
  const int64_t tile = taps + weights + grad + x + middle + hidden + staged;
  const int64_t sums = kMaxWarps * kChunk * (d + size * size + 2) * floats;  // over the tile, when all is done
  return std::max(tile, sums);
}

// Up to so many bytes, four blocks share a multiprocessor of an H100, and two one of an RTX 4090.
constexpr int64_t kAggregateSharedBytes = 48 * 1024;

// The tile of the least work, counted in pixels: of its result, K * K taps and D channels each, and of its halo, which
// is loaded. A function of the image alone unless the GPU's shared memory is too small.
template <class Bytes, class Warps>
constexpr AggregatePlan plan_tiles(int64_t height, int64_t width, int head_dim, int size, const Device& device,
                                   Bytes bytes_of, Warps warps_of) {
  AggregatePlan best{};
  int64_t least = 0;
  for (const int cols : {8, 16, 32}) {
    for (const int rows : {4, 8, 16}) {
      const int warps = warps_of(rows * cols);
      const int64_t shared = bytes_of(rows, cols);
      if (warps == 0 || shared > device.max_shared_per_block) continue;
      const int64_t tiles_x = ceil_div(width, cols), tiles = tiles_x * ceil_div(height, rows);
      const int64_t halo = (rows + size - 1) * (cols + 16);
      const int64_t crowded = std::max<int64_t>(1, ceil_div(shared, kAggregateSharedBytes));
      const int64_t work = tiles * (rows * cols * (size * size + head_dim) + 8 * halo) * (3 + crowded);
      if (best.warps == 0 || work < least) {
        least = work;
        best = {warps, rows, cols, tiles_x, tiles, shared};
      }
    }
  }
  return best;
}

// `bytes` of a stored value: 2 or 4.
inline AggregatePlan plan_aggregate(int64_t height, int64_t width, int head_dim, int size, int bytes,
                                    const Device& device) {
  const int warp_pixels = 8 * lane_pixels(head_dim);
  return plan_tiles(
      height, width, head_dim, size, device,
      [=](int rows, int cols) { return aggregate_shared_bytes(rows, cols, head_dim, size, bytes); },
      [=](int pixels) {
        return pixels % warp_pixels == 0 && pixels / warp_pixels <= kMaxWarps ? pixels / warp_pixels : 0;
      });
}

// Partial sums of the weights' gradients: one per run of tiles, of all images together.
constexpr int64_t kMaxRuns = 32;

struct AggregateGradPlan : AggregatePlan {
  int64_t tasks_per_run, runs;
};

inline AggregateGradPlan plan_aggregate_grad(int64_t batch, int64_t height, int64_t width, int head_dim, int size,
                                             int bytes, const Device& device) {
  const AggregatePlan tile = plan_tiles(
      height, width, head_dim, size, device,
      [=](int rows, int cols) { return aggregate_grad_shared_bytes(rows, cols, head_dim, size, bytes); },
      [](int pixels) { return pixels <= 256 ? kMaxWarps : 0; });
  const int64_t tasks = batch * tile.tiles, per_run = std::max<int64_t>(1, ceil_div(tasks, kMaxRuns));
  return {tile, per_run, ceil_div(tasks, per_run)};
}

// What lies between the products of lite_mla, fused: the aggregation with the sum of the states, and with their
// application. At D = 64 the sum would need more registers than there are; it runs op by op there, and in float32.
constexpr bool has_aggregate_attention(int64_t head_dim, int bytes) { return head_dim <= 32 && bytes == 2; }

// Tiles of the sum and of the application; `blocks` per head and image, of both.
struct AggregateAttentionPlan {
  AggregatePlan state, apply;
  int64_t tiles_per_split, splits;
  bool sums_splits;
};

constexpr int64_t aggregate_state_shared_bytes(int rows, int cols, int head_dim, int size) {
  const int64_t d = head_dim, floats = 4;
  const int64_t operand = std::max<int64_t>(d, 16) * d * floats;
  const int64_t taps = 2 * d * size * tap_pitch(size) * floats, biases = 3 * d * floats;
  const int64_t halo = d * halo_plane(rows, cols, size, halo_margin(2), 2, 8) * 2;
  const int64_t identity = 2 * d * halo_plane(rows, cols, 1, 0, 2, 4) * 2;
  const int64_t sums = (kMaxWarps + 1) * (d + 1) * d * floats;
  return operand + taps + biases + std::max(std::max(halo, identity), sums);
}

constexpr int64_t aggregate_apply_shared_bytes(int rows, int cols, int head_dim, int size) {
  const int64_t d = head_dim, floats = 4;
  const int64_t weights = 2 * d * d * floats, taps = d * size * tap_pitch(size) * floats, vectors = 3 * d * floats;
  return weights + taps + vectors + d * halo_plane(rows, cols, size, halo_margin(2), 2, 8) * 2;
}

inline AggregateAttentionPlan plan_aggregate_attention(int64_t height, int64_t width, int head_dim, int size,
                                                       const Device& device) {
  const auto warps_of = [](int pixels) { return pixels % 64 == 0 && pixels / 64 <= kMaxWarps ? pixels / 64 : 0; };
  AggregateAttentionPlan plan{};
  plan.state = plan_tiles(
      height, width, head_dim, size, device,
      [=](int rows, int cols) { return aggregate_state_shared_bytes(rows, cols, head_dim, size); }, warps_of);
  plan.apply = plan_tiles(
      height, width, head_dim, size, device,
      [=](int rows, int cols) { return aggregate_apply_shared_bytes(rows, cols, head_dim, size); }, warps_of);
  plan.tiles_per_split = std::max<int64_t>(1, ceil_div(plan.state.tiles, kMaxSplits));
  plan.splits = ceil_div(plan.state.tiles, plan.tiles_per_split);
  plan.sums_splits = plan.splits > kMaxSummedSplits;
  return plan;
}

}  // namespace efficientvit_kernels::cuda
