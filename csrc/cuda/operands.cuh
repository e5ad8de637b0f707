// Operands of the matrix products whose rows are tokens, and sums in a fixed order: what the ops share.
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
