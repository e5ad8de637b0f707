// The forward of relu_linear_attention for 16-bit storage on the matrix units, and what its backward,
// relu_linear_attention_backward_kernels.cuh, shares with it. Device code only: the launcher is
// relu_linear_attention.cu, the mathematics stands in efficientvit_kernels/reference/relu_linear_attention.py.
//
// `kv_state_kernel` sums v k'^T and k' over the tokens of a split; `apply_kernel` adds up the splits, in their order,
// and computes out. No atomics: the bits are those of a fixed tree of sums.
//
// A state is [D + 1, D] floats: rows of KV (v's channels), columns k's channels; the last row is z.
//
// q, k and v enter the products exactly, since TF32 holds 16-bit values. KV is rounded to TF32.
#pragma once

#include "operands.cuh"

namespace efficientvit_kernels::cuda {

constexpr int kMaxScales = 4;

struct ReluLinearAttentionArgs {
  Image qkv[kMaxScales];       // [B, heads * 3D, H, W] each
  Image grad_qkv[kMaxScales];  // as qkv
  Image out;                   // [B, G * D, H, W]: the output, or its gradient
  const float* states;         // [B, G, splits, D + 1, D], to be added up
  float* sums;                 // [B, G, splits, D + 1, D]: what this kernel sums
  float* state;                // [B, G, D + 1, D], or null: where the added-up state is stored
  int64_t groups;              // G, of all scales
  int64_t groups_here;         // of the scales in `qkv`
  int64_t blocks;              // per head and image
  int64_t splits;              // of `states`
  int heads;                   // per scale
  int scales[kMaxScales];      // which those in `qkv` are
  int tokens;
  int block_tokens;  // per block; of a sum, per split
  float eps;
};

// The head, image and tokens of a block.
struct Place {
  int64_t batch, group;  // the group among all scales
  int64_t block;
  int scale, head, start, stop;

  __device__ explicit Place(const ReluLinearAttentionArgs& args) {
    const int64_t id = blockIdx.x, pair = id / args.blocks, here = pair % args.groups_here;
    block = id % args.blocks;
    batch = pair / args.groups_here;
    scale = static_cast<int>(here / args.heads);
    head = static_cast<int>(here % args.heads);
    group = static_cast<int64_t>(args.scales[scale]) * args.heads + head;
    start = static_cast<int>(block * args.block_tokens);
    stop = min(start + args.block_tokens, args.tokens);
  }
  __device__ int64_t pair(const ReluLinearAttentionArgs& args) const { return batch * args.groups + group; }
};

// q, k or v (part 0, 1, 2) of a block's head.
template <class T>
__device__ Plane<T> part_of(const Image& qkv, const Place& place, int head_dim, int part) {
  return Plane<T>(qkv, place.batch, (place.head * 3 + part) * static_cast<int64_t>(head_dim));
}

// What the block's warps stage of Access::kElements lies first in its shared memory.
template <int D, Access kAccess>
__device__ int stage_bytes() {
  return kAccess == Access::kElements ? static_cast<int>(blockDim.x / 32) * 2 * stage_elements(D) : 0;
}

template <class T, int D>
__device__ T* stage_of(unsigned char* shared) {
  return reinterpret_cast<T*>(shared) + threadIdx.x / 32 * stage_elements(D);
}

// The sums that a warp accumulates: kRows rows of a [D + 1, D] state.
template <int D>
struct StateRows {
  static constexpr int kRows = rows_per_warp(D);
  static constexpr int kBlocks = D / kRows;  // of rows, in different warps
  static constexpr int kTiles = (kRows + 15) / 16;
  static constexpr int kNumel = (D + 1) * D;
  float acc[kTiles][D / 8][4] = {};

  // Into a [D + 1, D] state, whose rows from `first` on these are.
  __device__ void store(float* state, int first, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int i = 0; i < (kRows > 8 ? 4 : 2); ++i) {
          const int row = first + g * (kRows / 8) + 2 * tile + i / 2;
          state[row * D + (2 * t + i % 2) * (D / 8) + j] = acc[tile][j][i];
        }
      }
    }
  }
};

// Adds up the states of the block's warps, in their order, and writes the block's own.
__device__ inline void store_sum_of_warps(float* to, const float* states, int count, int numel) {
  __syncthreads();
  for (int e = threadIdx.x; e < numel; e += blockDim.x) to[e] = sum_of_splits(states, count, numel, e);
}

// sums[b, group, split] = sum over the split's tokens of v k'^T and k'.
template <class T, int D, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2) kv_state_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  using Rows = StateRows<D>;
  using Keys = ChannelFragment<T, D, kAccess>;
  using Values = ChannelFragment<T, Rows::kRows, kAccess>;
  T* stage = stage_of<T, D>(shared);
  float* states = reinterpret_cast<float*>(shared + stage_bytes<D, kAccess>());  // [runs, D + 1, D]
  const Place place(args);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp % Rows::kBlocks * Rows::kRows, run = warp / Rows::kBlocks;
  const int runs = blockDim.x / 32 / Rows::kBlocks;
  const Plane<T> k_plane = part_of<T>(args.qkv[place.scale], place, D, 1);
  Plane<T> v_plane = part_of<T>(args.qkv[place.scale], place, D, 2);
  v_plane.data += first_row * v_plane.stride_c;

  Rows rows;
  float z[D / 8] = {};
  Keys k_next;
  Values v_next;
  int n = place.start + run * Keys::kTokens;
  k_next.load(k_plane, n, place.stop, lane, stage);
  v_next.load(v_plane, n, place.stop, lane, stage);
  while (n < place.stop) {
    Keys k = k_next;
    const Values v = v_next;
    n += runs * Keys::kTokens;
    k_next.load(k_plane, n, place.stop, lane, stage);  // under way while the products run
    v_next.load(v_plane, n, place.stop, lane, stage);
    k.x.relu();
#pragma unroll
    for (int step = 0; step < Keys::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float2 pair = k.pair(step, i);
        z[i] += pair.x + pair.y;
      }
    }
    multiply_over_tokens<Rows::kRows, D>(
        rows.acc, [&](int step, int i) { return v.pair(step, i); }, [&](int step, int i) { return k.pair(step, i); });
  }
  float* own = states + run * Rows::kNumel;
  rows.store(own, first_row, lane);
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
    const float total = sum_of_row(z[i]);
    if (first_row == 0 && lane % 4 == 0) own[D * D + Keys::channel(lane, i)] = total;
  }
  float* sums = args.sums + (place.pair(args) * args.blocks + place.block) * Rows::kNumel;
  store_sum_of_warps(sums, states, runs, Rows::kNumel);
}

// out = KV q' / (z . q' + eps) for the block's tokens; the first block of a head stores the added-up state.
template <class T, int D, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2) apply_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  T* stage = stage_of<T, D>(shared);
  uint32_t* weight =
      reinterpret_cast<uint32_t*>(shared + stage_bytes<D, kAccess>());  // KV^T: from q's channels to out's
  float* z = reinterpret_cast<float*>(weight + D * D);                  // [D]
  const Place place(args);
  load_state<D>(weight, z, args, place);
  __syncthreads();

  using Fragment = TokenFragment<T, D, kAccess>;
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const Plane<T> q_plane = part_of<T>(args.qkv[place.scale], place, D, 0);
  const Plane<T> out_plane(args.out, place.batch, place.group * D);
  for (int n = place.start + static_cast<int>(threadIdx.x) / 32 * Fragment::kTokens; n < place.stop;
       n += warps * Fragment::kTokens) {
    Fragment x;
    x.load(q_plane, n, place.stop, lane, stage);
    x.x.relu();
#pragma unroll
    for (int i = 0; i < Fragment::kTokenPairs; ++i) {
      float den[2] = {0.0f, 0.0f};
      add_denominators<D>(den, z, lane, [&](int step) { return x.quad(i, step); });
      float num[D / 8][4] = {};
      multiply<D>(num, {weight}, lane, [&](int step) { return x.quad(i, step); });
      const Divisor divisors[2] = {Divisor(sum_of_row(den[0]) + args.eps), Divisor(sum_of_row(den[1]) + args.eps)};
#pragma unroll
      for (int j = 0; j < Fragment::kPairs; ++j) {
        Quad out;
#pragma unroll
        for (int c = 0; c < 4; ++c) out.v[c / 2][c % 2] = divisors[c / 2].divide(num[j][c]);
        x.set_quad(i, j, out);
      }
    }
    x.store(out_plane, n, place.stop, lane, stage);
  }
}

}  // namespace efficientvit_kernels::cuda
