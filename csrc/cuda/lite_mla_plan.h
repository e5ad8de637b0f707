// How lite_mla in two launches is laid out on a GPU, and where it is chosen; see launch_plan.h.
#pragma once

#include "aggregate_plan.h"

namespace efficientvit_kernels::cuda {

constexpr int ceil_div_int(int a, int b) { return (a + b - 1) / b; }
constexpr int padded_to(int count, int step) { return ceil_div_int(count, step) * step; }

// Values from a row of a 16-bit matrix to the next, for a multiple of 16 columns: an odd multiple of 16 bytes.
constexpr int weight_pitch(int columns) { return columns + 8; }
constexpr int input_pitch(int pixels) { return padded_to(pixels, 16) + 8; }

// Warps of a block of the second launch, one per head and 64 pixels.
constexpr int kBlockWarps = 8;

struct LiteMlaShape {
  int64_t batch, height, width;
  int channels, heads, head_dim, out_channels, size;  // size: of the depthwise kernel
  constexpr int width_of_heads() const { return heads * head_dim; }
};

// What the kernels serve, in 16 bits and with one scale.
constexpr bool has_two_launches(const LiteMlaShape& s) {
  return s.head_dim <= 32 && s.heads <= kBlockWarps && s.width_of_heads() % 8 == 0 && s.width_of_heads() <= 128 &&
         s.channels % 16 == 0 && s.channels <= 128 && s.out_channels % 16 == 0 && s.out_channels <= 128;
}

// Where two launches are predicted to be faster than four (`benchmarks/variants.py`; nothing is measured): products of
// few channels cost less with a halo than launches, or than the bytes of qkv.
constexpr bool prefers_two_launches(const LiteMlaShape& s) { return s.width_of_heads() <= 64; }

// Pixels of x that a tile and its halo show at most: rows may begin and end a column earlier and later.
constexpr int input_pixels(int rows, int cols, int size) {
  const int pad = size / 2;
  return (rows + 2 * pad) * (cols + 2 * padded_to(pad, 2));
}
// Values of x's tile in either order.
constexpr int64_t input_values(int rows, int cols, int size, int channels) {
  const int64_t pixels = input_pixels(rows, cols, size);
  const int64_t by_pixel = padded_to(static_cast<int>(pixels), 16) * int64_t{weight_pitch(channels)};
  return std::max(by_pixel, channels * int64_t{input_pitch(static_cast<int>(pixels))});
}

// In the order in which the kernels lay them out.
constexpr int64_t lite_mla_state_shared_bytes(int rows, int cols, const LiteMlaShape& s) {
  const int64_t d = s.head_dim, padded = std::max<int64_t>(d, 16), floats = 4;
  const int64_t operand = padded * d * floats, taps = 2 * d * s.size * tap_pitch(s.size) * floats;
  const int64_t biases = 5 * d * floats, weights = 2 * padded * weight_pitch(s.channels) * 2;
  const int64_t halos = 2 * d * halo_plane(rows, cols, s.size, halo_margin(2), 2, 8) * 2;
  const int64_t sums = (kMaxWarps + 1) * (d + 1) * d * floats;
  return operand + taps + biases + weights + std::max(halos + input_values(rows, cols, s.size, s.channels) * 2, sums);
}

// Values from a channel of a tile of results to the next.
constexpr int result_plane(int pixels) { return pixels + 8; }

constexpr int64_t lite_mla_apply_shared_bytes(int rows, int cols, const LiteMlaShape& s) {
  const int64_t d = s.head_dim, width = s.width_of_heads(), floats = 4;
  const int64_t operands = 3 * width * d * floats, vectors = 5 * width * floats;
  const int64_t taps = width * s.size * tap_pitch(s.size) * floats;
  const int64_t halo = width * halo_plane(rows, cols, s.size, halo_margin(2), 2, 8) * 2;
  const int64_t weights = padded_to(s.width_of_heads(), 32) * int64_t{weight_pitch(s.channels)} * 2;
  const int64_t products = weights + input_values(rows, cols, s.size, s.channels) * 2;
  const int64_t projection = padded_to(s.out_channels, 32) * int64_t{weight_pitch(2 * s.width_of_heads())} * 2;
  const int64_t results = s.out_channels * int64_t{tile_plane(rows * cols, 2)} * 2;
  return operands + vectors + taps + halo + std::max(products, projection + results);
}

struct LiteMlaPlan {
  AggregatePlan state, apply;
  int64_t tiles_per_split, splits;
  bool sums_splits;  // a third launch

  bool fits() const { return state.warps > 0 && apply.warps > 0; }
};

inline LiteMlaPlan plan_lite_mla(const LiteMlaShape& s, const Device& device) {
  LiteMlaPlan plan{};
  plan.state = plan_tiles(
      s.height, s.width, s.head_dim, s.size, device,
      [&](int rows, int cols) { return lite_mla_state_shared_bytes(rows, cols, s); },
      [](int pixels) { return pixels % 64 == 0 && pixels / 64 <= kMaxWarps ? kMaxWarps : 0; });
  plan.apply = plan_tiles(
      s.height, s.width, s.head_dim, s.size, device,
      [&](int rows, int cols) { return lite_mla_apply_shared_bytes(rows, cols, s); },
      [&](int pixels) { return pixels % 64 == 0 && s.heads * (pixels / 64) <= kBlockWarps ? kBlockWarps : 0; });
  plan.tiles_per_split = std::max<int64_t>(1, ceil_div(plan.state.tiles, kMaxSplits));
  plan.splits = ceil_div(plan.state.tiles, plan.tiles_per_split);
  plan.sums_splits = plan.splits > kMaxSummedSplits;
  return plan;
}

}  // namespace efficientvit_kernels::cuda
