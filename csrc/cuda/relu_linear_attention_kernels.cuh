// relu_linear_attention for 16-bit storage on the matrix units. Device code only: the launcher is
// relu_linear_attention.cu, the mathematics stands in efficientvit_kernels/reference/relu_linear_attention.py.
//
// Forward: `kv_state_kernel` sums v k'^T and k' over the tokens of a split; `apply_kernel` adds up the splits, in their
// order, and computes out. Backward: `grad_state_kernel` reads q and grad_out, writes grad_q, and sums the gradient of
// the state; `grad_kv_kernel` applies that to k and v. No atomics: the bits are those of a fixed tree of sums.
//
// A state is [D + 1, D] floats: rows of KV (v's channels), columns k's channels; the last row is z.
//
// Operands: q, k, v and grad_out enter exactly, since TF32 holds 16-bit values. KV is rounded to TF32 forward. Backward
// the state and its gradient enter as two TF32 parts, x = high + low, and grad_out / den as one that is the same
// wherever it is used: with one part, terms that cancel exactly would leave the rounding of large ones.
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

  // += rows . columns^T over 32 tokens; rows(step, i), columns(step, i): both tokens of a step, for channel i of a
  // lane.
  template <class Rows, class Columns>
  __device__ void add(Rows rows, Columns columns) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float2 low = rows(step, 2 * tile);
        const float2 high = kRows > 8 ? rows(step, 2 * tile + 1) : make_float2(0.0f, 0.0f);
        const uint32_t a[4] = {__float_as_uint(low.x), __float_as_uint(high.x), __float_as_uint(low.y),
                               __float_as_uint(high.y)};
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          const float2 column = columns(step, j);
          const uint32_t b[2] = {__float_as_uint(column.x), __float_as_uint(column.y)};
          mma_m16n8k8_tf32(acc[tile][j], a, b);
        }
      }
    }
  }

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
    rows.add([&](int step, int i) { return v.pair(step, i); }, [&](int step, int i) { return k.pair(step, i); });
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
  constexpr int kNumel = (D + 1) * D;
  T* stage = stage_of<T, D>(shared);
  uint32_t* weight =
      reinterpret_cast<uint32_t*>(shared + stage_bytes<D, kAccess>());  // KV^T: from q's channels to out's
  float* z = reinterpret_cast<float*>(weight + D * D);                  // [D]
  const Place place(args);
  const float* states = args.states + place.pair(args) * args.splits * kNumel;
  float* state = args.state != nullptr && place.block == 0 ? args.state + place.pair(args) * kNumel : nullptr;
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const float total = sum_of_splits(states, args.splits, kNumel, e);
    if (state != nullptr) state[e] = total;
    if (e < D * D) {
      weight[operand_index<D>(e % D, e / D)] = to_tf32(total);
    } else {
      z[e - D * D] = total;
    }
  }
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
#pragma unroll
      for (int j = 0; j < Fragment::kPairs; ++j) {
        const Quad q = x.quad(i, j);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight_of_den = shared_float(z + Fragment::channel(lane, 2 * j + e));
          den[0] += weight_of_den * q.v[0][e], den[1] += weight_of_den * q.v[1][e];
        }
      }
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

// With dnum = grad_out / den and dden = -(q' . KV^T dnum) / den: grad_q = (KV^T dnum + dden z) [q > 0], and the sums
// over the split's tokens of dnum q'^T and dden q'.
template <class T, int D, Access kAccess>
__global__ void __launch_bounds__(kThreads, 2) grad_state_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  using Fragment = TokenFragment<T, D, kAccess>;
  using Rows = StateRows<D>;
  using Columns = ChannelFragment<T, D, kAccess>;
  using RowsOfTokens = ChannelFragment<T, Rows::kRows, kAccess>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  T* stage = stage_of<T, D>(shared);
  uint32_t* high =
      reinterpret_cast<uint32_t*>(shared + stage_bytes<D, kAccess>());  // KV: from out's channels to q's, in two parts
  uint32_t* low = high + D * D;
  float* z = reinterpret_cast<float*>(low + D * D);
  float* dens = z + D;                // [warps * 64] at most, of the tokens under way
  float* states = dens + warps * 64;  // [runs, D + 1, D]
  const Place place(args);
  const float* state = args.states + place.pair(args) * Rows::kNumel;
  for (int e = threadIdx.x; e < Rows::kNumel; e += blockDim.x) {
    if (e < D * D) {
      const int at = operand_index<D>(e / D, e % D);
      high[at] = to_tf32(state[e]);
      low[at] = to_tf32(state[e] - __uint_as_float(high[at]));
    } else {
      z[e - D * D] = state[e];
    }
  }
  __syncthreads();

  const int first_row = warp % Rows::kBlocks * Rows::kRows, run = warp / Rows::kBlocks;
  const int runs = warps / Rows::kBlocks;
  const Plane<T> q_plane = part_of<T>(args.qkv[place.scale], place, D, 0);
  const Plane<T> grad_q_plane = part_of<T>(args.grad_qkv[place.scale], place, D, 0);
  const Plane<T> grad_plane(args.out, place.batch, place.group * D);
  Plane<T> grad_rows_plane = grad_plane;
  grad_rows_plane.data += first_row * grad_plane.stride_c;
  Rows rows;
  float grad_z[Fragment::kChannels] = {};
  for (int tile = place.start; tile < place.stop; tile += warps * Fragment::kTokens) {
    const int n = tile + warp * Fragment::kTokens;
    Fragment q, grad;
    q.load(q_plane, n, place.stop, lane, stage);
    grad.load(grad_plane, n, place.stop, lane, stage);
    q.x.relu();
#pragma unroll
    for (int i = 0; i < Fragment::kTokenPairs; ++i) {
      float den[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < Fragment::kPairs; ++j) {
        const Quad x = q.quad(i, j);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float weight_of_den = shared_float(z + Fragment::channel(lane, 2 * j + e));
          den[0] += weight_of_den * x.v[0][e], den[1] += weight_of_den * x.v[1][e];
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = Fragment::token(lane, 2 * i + h);
        const float total = sum_of_row(den[h]) + args.eps;
        den[h] = n + token < place.stop ? total : 1.0f;  // what is not there must not divide by an eps of 0
        if (lane % 4 == 0) dens[warp * Fragment::kTokens + token] = den[h];
      }
      const Divisor divisors[2] = {Divisor(den[0]), Divisor(den[1])};
      float grad_q[D / 8][4] = {};
      const auto grad_num = [&](int step) {
        Quad x = grad.quad(i, step);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          x.v[c / 2][c % 2] = __uint_as_float(to_tf32(divisors[c / 2].divide(x.v[c / 2][c % 2])));
        }
        return x;
      };
      multiply<D>(grad_q, {high, low}, lane, grad_num);
      q.unpack_anew(i);
      float grad_den[2] = {0.0f, 0.0f};
#pragma unroll
      for (int j = 0; j < Fragment::kPairs; ++j) {
        const Quad x = q.quad(i, j);
#pragma unroll
        for (int c = 0; c < 4; ++c) grad_den[c / 2] += x.v[c / 2][c % 2] * grad_q[j][c];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) grad_den[h] = -divisors[h].divide(sum_of_row(grad_den[h]));
#pragma unroll
      for (int j = 0; j < Fragment::kPairs; ++j) {
        const Quad x = q.quad(i, j);
        Quad grad_x;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int h = c / 2, channel = 2 * j + c % 2;
          grad_z[channel] += grad_den[h] * x.v[h][c % 2];
          const float sum = grad_q[j][c] + grad_den[h] * shared_float(z + Fragment::channel(lane, channel));
          grad_x.v[h][c % 2] = x.v[h][c % 2] <= 0.0f ? 0.0f : sum;
        }
        q.set_quad(i, j, grad_x);
      }
    }
    q.store(grad_q_plane, n, place.stop, lane, stage);

    // The sums over tokens need lanes that own channels: the same values once more, now from the L1 cache.
    __syncthreads();
    for (int offset = run * 32; offset < warps * Fragment::kTokens; offset += runs * 32) {
      if (tile + offset >= place.stop) break;
      Columns x;
      RowsOfTokens y;
      x.load(q_plane, tile + offset, place.stop, lane, stage);
      y.load(grad_rows_plane, tile + offset, place.stop, lane, stage);
      x.x.relu();
      Divisor divisors[8] = {
          Divisor(dens[offset + Columns::token(lane, 0)]), Divisor(dens[offset + Columns::token(lane, 1)]),
          Divisor(dens[offset + Columns::token(lane, 2)]), Divisor(dens[offset + Columns::token(lane, 3)]),
          Divisor(dens[offset + Columns::token(lane, 4)]), Divisor(dens[offset + Columns::token(lane, 5)]),
          Divisor(dens[offset + Columns::token(lane, 6)]), Divisor(dens[offset + Columns::token(lane, 7)])};
      rows.add(
          [&](int step, int i) {
            const float2 pair = y.pair(step, i);
            return make_float2(__uint_as_float(to_tf32(divisors[2 * step].divide(pair.x))),
                               __uint_as_float(to_tf32(divisors[2 * step + 1].divide(pair.y))));
          },
          [&](int step, int i) { return x.pair(step, i); });
    }
    __syncthreads();  // before the next tokens' denominators
  }
  float* own = states + run * Rows::kNumel;
  rows.store(own, first_row, lane);
  float* grad_zs = dens;  // [warps, D]: at most as many as denominators
#pragma unroll
  for (int i = 0; i < Fragment::kChannels; ++i) {
    const float total = sum_of_column(grad_z[i]);
    if (lane < 4) grad_zs[warp * D + Fragment::channel(lane, i)] = total;
  }
  __syncthreads();
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    for (int r = 0; r < runs; ++r) {  // z's gradient lies in every warp, rows of KV's in the warps of a run
      float total = 0.0f;
      for (int w = r * Rows::kBlocks; w < (r + 1) * Rows::kBlocks; ++w) total += grad_zs[w * D + c];
      states[r * Rows::kNumel + D * D + c] = total;
    }
  }
  float* sums = args.sums + (place.pair(args) * args.blocks + place.block) * Rows::kNumel;
  store_sum_of_warps(sums, states, runs, Rows::kNumel);
}

// grad_v = dKV k' and grad_k = (dKV^T v + dz) [k > 0] for the block's tokens.
template <class T, int D, Access kAccess>
__global__ void __launch_bounds__(kThreads, D <= 16 ? 2 : 0) grad_kv_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kNumel = (D + 1) * D;
  // Half a tile where ptxas spills some bytes of a whole one, for sm_90 or sm_100.
  constexpr int kTileTokens = D == 64 && kAccess != Access::kTokens ? tile_tokens(D) / 2 : tile_tokens(D);
  using Fragment = TokenFragment<T, D, kAccess, kTileTokens>;
  T* stage = stage_of<T, D>(shared);
  uint32_t* to_v = reinterpret_cast<uint32_t*>(shared + stage_bytes<D, kAccess>());  // dKV^T: from k's channels to v's
  uint32_t* to_k_high = to_v + D * D;  // dKV: from v's channels to k's, in two parts
  uint32_t* to_k_low = to_k_high + D * D;
  float* grad_z = reinterpret_cast<float*>(to_k_low + D * D);
  const Place place(args);
  const float* states = args.states + place.pair(args) * args.splits * kNumel;
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const float total = sum_of_splits(states, args.splits, kNumel, e);
    if (e < D * D) {
      const uint32_t rounded = to_tf32(total);
      to_v[operand_index<D>(e % D, e / D)] = rounded;
      to_k_high[operand_index<D>(e / D, e % D)] = rounded;
      to_k_low[operand_index<D>(e / D, e % D)] = to_tf32(total - __uint_as_float(rounded));
    } else {
      grad_z[e - D * D] = total;
    }
  }
  __syncthreads();

  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const Plane<T> k_plane = part_of<T>(args.qkv[place.scale], place, D, 1);
  const Plane<T> v_plane = part_of<T>(args.qkv[place.scale], place, D, 2);
  const Plane<T> grad_k_plane = part_of<T>(args.grad_qkv[place.scale], place, D, 1);
  const Plane<T> grad_v_plane = part_of<T>(args.grad_qkv[place.scale], place, D, 2);
  for (int n = place.start + static_cast<int>(threadIdx.x) / 32 * Fragment::kTokens; n < place.stop;
       n += warps * Fragment::kTokens) {
    Fragment k, v;
    k.load(k_plane, n, place.stop, lane, stage);
    v.load(v_plane, n, place.stop, lane, stage);
    k.x.relu();
#pragma unroll
    for (int i = 0; i < Fragment::kTokenPairs; ++i) {
      float grad_v[D / 8][4] = {}, grad_k[D / 8][4] = {};
      multiply<D>(grad_k, {to_k_high, to_k_low}, lane, [&](int step) { return v.quad(i, step); });
      multiply<D>(grad_v, {to_v}, lane, [&](int step) { return k.quad(i, step); });
      k.unpack_anew(i);
#pragma unroll
      for (int j = 0; j < Fragment::kPairs; ++j) {
        const Quad x = k.quad(i, j);
        Quad of_k, of_v;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float sum = grad_k[j][c] + shared_float(grad_z + Fragment::channel(lane, 2 * j + c % 2));
          of_k.v[c / 2][c % 2] = x.v[c / 2][c % 2] <= 0.0f ? 0.0f : sum;
          of_v.v[c / 2][c % 2] = grad_v[j][c];
        }
        k.set_quad(i, j, of_k);
        v.set_quad(i, j, of_v);
      }
    }
    k.store(grad_k_plane, n, place.stop, lane, stage);
    v.store(grad_v_plane, n, place.stop, lane, stage);
  }
}

}  // namespace efficientvit_kernels::cuda
