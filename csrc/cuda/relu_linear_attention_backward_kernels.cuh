// The backward of relu_linear_attention for 16-bit storage on the matrix units; see relu_linear_attention_kernels.cuh.
//
// `grad_state_kernel` reads q and grad_out, writes grad_q, and sums the gradient of the state over the tokens of a
// split; `grad_kv_kernel` adds up the splits, in their order, and applies that gradient to k and v. No atomics.
//
// q, k, v and grad_out enter the products exactly. The state and its gradient enter as two TF32 parts, x = high + low,
// and grad_out / den as one that is the same wherever it is used: with one part, terms that cancel exactly would leave
// the rounding of large ones.
#pragma once

#include "relu_linear_attention_kernels.cuh"

namespace efficientvit_kernels::cuda {

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
      add_denominators<D>(den, z, lane, [&](int step) { return q.quad(i, step); });
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
      multiply_over_tokens<Rows::kRows, D>(
          rows.acc,
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
  // Half a tile where ptxas spills some bytes of a whole one, for sm_90 or sm_100.
  constexpr int kTileTokens = D == 64 && kAccess != Access::kTokens ? tile_tokens(D) / 2 : tile_tokens(D);
  using Fragment = TokenFragment<T, D, kAccess, kTileTokens>;
  T* stage = stage_of<T, D>(shared);
  uint32_t* to_v = reinterpret_cast<uint32_t*>(shared + stage_bytes<D, kAccess>());  // dKV^T: from k's channels to v's
  uint32_t* to_k_high = to_v + D * D;  // dKV: from v's channels to k's, in two parts
  uint32_t* to_k_low = to_k_high + D * D;
  float* grad_z = reinterpret_cast<float*>(to_k_low + D * D);
  const Place place(args);
  add_up_splits<D>(args, place, nullptr, [=](int e, float sum) {
    if (e < D * D) {
      const uint32_t rounded = to_tf32(sum);
      to_v[operand_index<D>(e % D, e / D)] = rounded;
      to_k_high[operand_index<D>(e / D, e % D)] = rounded;
      to_k_low[operand_index<D>(e / D, e % D)] = to_tf32(sum - __uint_as_float(rounded));
    } else {
      grad_z[e - D * D] = sum;
    }
  });
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
