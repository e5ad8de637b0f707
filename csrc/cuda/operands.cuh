// Operands of the matrix products over channels and over tokens, and sums in a fixed order: what the ops share.
#pragma once

#include "tile.cuh"

namespace efficientvit_kernels::cuda {

// Where operand B holds the weight from channel `k` of the sum to channel `n` of the result: in the order in which
// lanes read it, for the channels that `TokenFragment` gives them.
template <int D>
__device__ int operand_index(int k, int n) {
  constexpr int kChannels = D / 4;
  const int step = k % kChannels / 2, t = k / kChannels;
  const int column = n % kChannels / 2, g = n / kChannels * 2 + n % 2;
  return ((step * (D / 8) + column) * 32 + g * 4 + t) * 2 + k % 2;
}

// Element `e` of `count` states, added up in their order, with what each addition rounds away carried along: up to 32
// partial sums come together here. Infinities and NaN have no error.
__device__ inline float sum_of_splits(const float* states, int64_t count, int64_t numel, int64_t e) {
  float total = states[e], low = 0.0f;
  for (int64_t i = 1; i < count; ++i) {
    const float x = states[i * numel + e], sum = total + x, part = sum - total;
    low += (total - (sum - part)) + (x - part);
    total = sum;
  }
  return isfinite(low) ? total + low : total;
}

// take(e, sum) for the elements of a head's [D + 1, D] state, whose splits are added up. The first block of the head
// stores them in `sums` [B, G, D + 1, D], unless that is null.
template <int D, class Args, class Block, class Take>
__device__ void add_up_splits(const Args& args, const Block& block, float* sums, Take take) {
  constexpr int kNumel = (D + 1) * D;
  const float* states = args.states + block.pair(args) * args.splits * kNumel;
  float* state = sums != nullptr && block.block == 0 ? sums + block.pair(args) * kNumel : nullptr;
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const float sum = sum_of_splits(states, args.splits, kNumel, e);
    if (state != nullptr) state[e] = sum;
    take(e, sum);
  }
}

// The added-up state as attention applies it: KV^T, from q's channels to out's, as operand B in TF32; z as it is.
template <int D, class Args, class Block>
__device__ void load_state(uint32_t* kv, float* z, const Args& args, const Block& block) {
  add_up_splits<D>(args, block, args.state, [=](int e, float sum) {
    if (e < D * D) {
      kv[operand_index<D>(e % D, e / D)] = to_tf32(sum);
    } else {
      z[e - D * D] = sum;
    }
  });
}

// x / den with one division per token. 1 / den would overflow for a subnormal den, and lose bits for a huge one, where
// the quotient need not.
struct Divisor {
  float den, inverse;
  bool by_inverse;

  __device__ explicit Divisor(float den) : den(den), inverse(1.0f / den) {
    const float size = fabsf(den);
    by_inverse = (size >= 0x1p-126f && size <= 0x1p126f) || !(size > 0.0f) || isinf(size);
  }
  __device__ float divide(float x) const { return by_inverse ? x * inverse : x / den; }
};

// acc += a . (weights[0] + ...) for one pair of tokens per lane, where a(step) gives the quad of operand A.
template <int D, int kParts, class A>
__device__ void multiply(float (&acc)[D / 8][4], const uint32_t* const (&weights)[kParts], int lane, A a) {
#pragma unroll
  for (int step = 0; step < D / 8; ++step) {
    const Quad q = a(step);
    const uint32_t operand[4] = {__float_as_uint(q.v[0][0]), __float_as_uint(q.v[1][0]), __float_as_uint(q.v[0][1]),
                                 __float_as_uint(q.v[1][1])};
#pragma unroll
    for (int column = 0; column < D / 8; ++column) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t b[2];
        shared_pair(b, weights[part] + ((step * (D / 8) + column) * 32 + lane) * 2);
        mma_m16n8k8_tf32(acc[column], operand, b);
      }
    }
  }
}

// acc += rows . columns^T, summed over the 8 tokens of each of the 4 lanes of a row, two of them in each of 4 steps.
// rows(step, i), columns(step, i): both tokens of a step, of row or column 8 * i + g.
template <int kRows, int kColumns, class Rows, class Columns>
__device__ void multiply_over_tokens(float (&acc)[(kRows + 15) / 16][kColumns / 8][4], Rows rows, Columns columns) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int tile = 0; tile < (kRows + 15) / 16; ++tile) {
      const float2 low = rows(step, 2 * tile);
      const float2 high = kRows > 8 ? rows(step, 2 * tile + 1) : make_float2(0.0f, 0.0f);
      const uint32_t a[4] = {__float_as_uint(low.x), __float_as_uint(high.x), __float_as_uint(low.y),
                             __float_as_uint(high.y)};
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float2 column = columns(step, j);
        const uint32_t b[2] = {__float_as_uint(column.x), __float_as_uint(column.y)};
        mma_m16n8k8_tf32(acc[tile][j], a, b);
      }
    }
  }
}

// den += z . q' over the lane's channels, for one pair of its tokens, where query(step) gives the quad of q'.
template <int D, class Query>
__device__ void add_denominators(float (&den)[2], const float* z, int lane, Query query) {
#pragma unroll
  for (int step = 0; step < D / 8; ++step) {
    const Quad q = query(step);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float weight = shared_float(z + lane % 4 * (D / 4) + 2 * step + e);
      den[0] += weight * q.v[0][e], den[1] += weight * q.v[1][e];
    }
  }
}

// The sum over the 4 lanes that share a row of tokens.
__device__ inline float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// The sum over the 8 rows of lanes.
__device__ inline float sum_of_column(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

}  // namespace efficientvit_kernels::cuda
