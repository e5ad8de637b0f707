// How a problem is laid out on a GPU: a pure function of shapes, storage and device, shared by the launchers, the
// introspection module and the tests. No CUDA headers: it compiles everywhere.
//
// Nothing here is measured yet: the constants come from the byte and FLOP counts that stand beside them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

namespace efficientvit_kernels::cuda {

struct Device {
  int arch;  // 10 * major + minor of the compute capability
  int multiprocessors;
  int64_t max_shared_per_block;  // bytes, with the opt-in
};

// A warp computes the tokens' products in tiles of so many, 8 or 4 for each of the 8 rows of lanes (`TokenFragment`):
// at D = 64, 8 would take 64 registers a lane for each of q and grad_out alone.
constexpr int tile_tokens(int head_dim) { return head_dim <= 32 ? 64 : 32; }
constexpr int kMaxWarps = 4;
// Rows of a [D + 1, D] state that a warp sums up, at most 32 registers a lane; other warps of the block take the rest.
constexpr int rows_per_warp(int head_dim) { return head_dim <= 32 ? head_dim : 16; }

// Of one warp, for what cannot be loaded in groups (`Staged`): a tile of tokens with its pad.
constexpr int stage_elements(int head_dim) { return head_dim * (tile_tokens(head_dim) + 8); }

// float32 storage, whose kernels have no matrix units: tokens in shared memory, and groups of threads that each sum up
// a whole state.
constexpr int kTileTokensFp32 = 64;
constexpr int kThreads = 32 * kMaxWarps;
constexpr int patch_columns(int head_dim) { return head_dim < 64 ? 4 : 8; }
constexpr int patch_groups(int head_dim) { return kThreads / (head_dim / 4 * (head_dim / patch_columns(head_dim))); }

// Every split of the sum over tokens writes a state that is read again (4 KB at D = 32, as much as 64 tokens of k and v
// in 16 bits), and gives one more block per head.
constexpr int64_t kTokensPerSplit = 256;
constexpr int64_t kMaxSplits = 32;
// So many splits are added up by their readers, which saves a launch; they read 4 KB more each at D = 32.
constexpr int64_t kMaxSummedSplits = 8;
// Blocks of a kernel without sums: up to so many for every multiprocessor, then each takes more tokens, since each must
// load the states first.
constexpr int64_t kBlocksPerMultiprocessor = 8;

constexpr bool has_head_dim(int64_t head_dim) {
  return head_dim == 8 || head_dim == 16 || head_dim == 32 || head_dim == 64;
}

// body(D) with the head dimension at hand as a compile-time constant.
template <class Body>
auto for_head_dim(int64_t head_dim, Body body) {
  switch (head_dim) {
    case 8:
      return body(std::integral_constant<int, 8>{});
    case 16:
      return body(std::integral_constant<int, 16>{});
    case 32:
      return body(std::integral_constant<int, 32>{});
    default:
      return body(std::integral_constant<int, 64>{});
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `block_tokens` of an image go to one block.
struct TokenPlan {
  int warps;
  int64_t block_tokens;
  int64_t blocks;  // per head and image
  int64_t shared_bytes;
  int64_t stage_bytes = 0;  // more, where tensors are moved one element at a time
};

struct ReluLinearAttentionPlan {
  TokenPlan kv_state, apply, grad_state, grad_kv;
  bool sums_splits;  // a launch of its own adds up the splits

  int64_t splits() const { return kv_state.blocks; }
  int64_t states_to_read() const { return sums_splits ? 1 : splits(); }
};

// A function of the tokens alone, so that an image's bits do not depend on its batch or on the GPU.
constexpr int64_t tokens_per_split(int64_t tokens) {
  return std::max<int64_t>(1, ceil_div(tokens, kMaxSplits * kTokensPerSplit)) * kTokensPerSplit;
}

// Of a block with work for this many tokens at a time: 1, 2 or 4 warps, and no fewer than share the rows of a state.
constexpr int warps_for(int64_t tokens, int head_dim) {
  const auto tiles = static_cast<uint64_t>(ceil_div(tokens, tile_tokens(head_dim)));
  const int least = head_dim / rows_per_warp(head_dim);
  return std::clamp(static_cast<int>(std::bit_ceil(std::min<uint64_t>(tiles, kMaxWarps))), least, kMaxWarps);
}

// `heads`: of all scales and images. What lies in shared memory: see the kernels, in this order.
inline ReluLinearAttentionPlan plan_relu_linear_attention(int64_t heads, int64_t tokens, int head_dim, bool fp32,
                                                          const Device& device) {
  const int64_t d = head_dim, floats = 4, state = (d + 1) * d * floats, split = tokens_per_split(tokens);
  const int warps = fp32 ? kMaxWarps : warps_for(std::min(tokens, split), head_dim);
  const int64_t wanted = std::max<int64_t>(1, kBlocksPerMultiprocessor * device.multiprocessors / heads);
  const int64_t tile = fp32 ? kThreads : int64_t{warps} * tile_tokens(head_dim);
  const int64_t per_block = ceil_div(ceil_div(tokens, wanted), tile) * tile;
  const int64_t splits = ceil_div(tokens, split), blocks = ceil_div(tokens, per_block);
  const bool sums_splits = splits > kMaxSummedSplits;
  if (fp32) {
    const int64_t tiles = 2 * kTileTokensFp32 * (d + 4) * floats, sums = patch_groups(head_dim) * state;
    return {
        .kv_state = {warps, split, splits, tiles + sums},
        .apply = {warps, per_block, blocks, state},
        .grad_state = {warps, split, splits, state + tiles + kTileTokensFp32 * floats + sums},
        .grad_kv = {warps, per_block, blocks, state + tiles},
        .sums_splits = sums_splits,
    };
  }
  const int64_t sums = warps / (head_dim / rows_per_warp(head_dim)) * state, weight = d * d * floats, z = d * floats;
  const int64_t stage = int64_t{warps} * stage_elements(head_dim) * 2;
  return {
      .kv_state = {warps, split, splits, sums, stage},
      .apply = {warps, per_block, blocks, weight + z, stage},
      .grad_state = {warps, split, splits, 2 * weight + z + warps * 64 * floats + sums, stage},
      .grad_kv = {warps, per_block, blocks, 3 * weight + z, stage},
      .sums_splits = sums_splits,
  };
}

}  // namespace efficientvit_kernels::cuda
