// relu_linear_attention for float32 storage: the same kernels as for 16 bits, with IEEE float32 products, which the
// matrix units do not have. At D <= 32 they do fewer FLOPs per byte than the fp32 units have to
// spare (8 forward, 11 backward, of 14 on an H200).
//
// Tiles of tokens lie in shared memory, [token][channel] with a pad. Sums over tokens: every thread owns a patch of the
// state. The rest: one or two threads own a token.
#pragma once

#include "relu_linear_attention_kernels.cuh"

namespace efficientvit_kernels::cuda {

// float4 at a time, and neighbouring tokens in different banks.
template <int D>
constexpr int kPitch = D + 4;

__device__ inline float4 float4_at(const float* p) { return *reinterpret_cast<const float4*>(p); }

// tile[token][channel] for the tokens first to first + kTileTokensFp32 - 1; those from `stop` on are 0.
template <int D>
__device__ void load_tile(float* tile, const Plane<float>& plane, int first, int stop, bool with_relu) {
  const bool along_channels = plane.stride_c == 1;
  for (int e = threadIdx.x; e < D * kTileTokensFp32; e += blockDim.x) {
    const int token = along_channels ? e / D : e % kTileTokensFp32;
    const int channel = along_channels ? e % D : e / kTileTokensFp32;
    float x = 0.0f;
    if (first + token < stop) x = plane.data[channel * plane.stride_c + plane.offset(first + token)];
    tile[token * kPitch<D> + channel] = with_relu ? relu(x) : x;
  }
}

// A [D + 1, D] state summed over tokens. A thread owns 4 rows by kColumns columns for every kGroups-th token.
template <int D>
struct StatePatch {
  static constexpr int kColumns = D < 64 ? 4 : 8;
  static constexpr int kAcross = D / kColumns;
  static constexpr int kGroups = kThreads / (D / 4 * kAcross);
  static constexpr int kNumel = (D + 1) * D;
  float acc[4][kColumns] = {};
  float last[kColumns] = {};
  int row, column, group;

  __device__ StatePatch()
      : row(threadIdx.x / kAcross % (D / 4) * 4),
        column(threadIdx.x % kAcross * kColumns),
        group(threadIdx.x / (D / 4 * kAcross)) {}

  // += rows[token] columns[token]^T; the last row, weights[token] columns[token]^T, where weights are 1 if null.
  __device__ void add(const float* rows, const float* columns, const float* weights) {
    for (int token = group; token < kTileTokensFp32; token += kGroups) {
      const float4 y = float4_at(rows + token * kPitch<D> + row);
      const float weight = weights == nullptr ? 1.0f : weights[token];
#pragma unroll
      for (int c = 0; c < kColumns; c += 4) {
        const float4 x = float4_at(columns + token * kPitch<D> + column + c);
        const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[i][c + j] += ys[i] * xs[j];
          last[c + j] += weight * xs[j];
        }
      }
    }
  }

  // The sums of all groups, through `states` [kGroups, D + 1, D].
  __device__ void store(float* to, float* states) const {
    float* own = states + group * kNumel;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) own[(row + i) * D + column + c] = acc[i][c];
      if (row == 0) own[D * D + column + c] = last[c];
    }
    store_sum_of_warps(to, states, kGroups, kNumel);
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads, 2) kv_state_fp32_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  float* k = reinterpret_cast<float*>(shared);
  float* v = k + kTileTokensFp32 * kPitch<D>;
  float* states = v + kTileTokensFp32 * kPitch<D>;
  const Place place(args);
  const Plane<float> k_plane = part_of<float>(args.qkv[place.scale], place, D, 1);
  const Plane<float> v_plane = part_of<float>(args.qkv[place.scale], place, D, 2);
  StatePatch<D> patch;
  for (int n = place.start; n < place.stop; n += kTileTokensFp32) {
    load_tile<D>(k, k_plane, n, place.stop, true);
    load_tile<D>(v, v_plane, n, place.stop, false);
    __syncthreads();
    patch.add(v, k, nullptr);
    __syncthreads();
  }
  patch.store(args.sums + (place.pair(args) * args.blocks + place.block) * StatePatch<D>::kNumel, states);
}

template <int D>
__global__ void __launch_bounds__(kThreads, 2) apply_fp32_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  float* kv = reinterpret_cast<float*>(shared);  // [D + 1, D]
  const Place place(args);
  add_up_splits<D>(args, place, args.state, [=](int e, float sum) { kv[e] = sum; });
  __syncthreads();

  const Plane<float> q_plane = part_of<float>(args.qkv[place.scale], place, D, 0);
  const Plane<float> out_plane(args.out, place.batch, place.group * D);
  for (int n = place.start + static_cast<int>(threadIdx.x); n < place.stop; n += blockDim.x) {
    const float* p_q = q_plane.data + q_plane.offset(n);
    float* p_out = out_plane.data + out_plane.offset(n);
    float q[D], den = 0.0f;
#pragma unroll
    for (int c = 0; c < D; ++c) q[c] = relu(p_q[c * q_plane.stride_c]);
#pragma unroll
    for (int c = 0; c < D; c += 4) {
      const float4 z = float4_at(kv + D * D + c);
      den += z.x * q[c], den += z.y * q[c + 1], den += z.z * q[c + 2], den += z.w * q[c + 3];
    }
    den += args.eps;
    for (int row = 0; row < D; ++row) {
      float num = 0.0f;
#pragma unroll
      for (int c = 0; c < D; c += 4) {
        const float4 x = float4_at(kv + row * D + c);
        num += x.x * q[c], num += x.y * q[c + 1], num += x.z * q[c + 2], num += x.w * q[c + 3];
      }
      p_out[row * out_plane.stride_c] = num / den;
    }
  }
}

// A sum of products as high + low, with the rounding errors of its terms in `low` (Ogita, Rump and Oishi's Dot2). The
// gradient of q is a difference, u - (q' . u) / den z with u = KV^T dnum, that cancels where a denominator is tiny:
// then an error in u cancels as u itself does, but one in the quotient does not.
struct Sum {
  float high = 0.0f, low = 0.0f;

  __device__ void add(float x, float error) {
    const float sum = high + x, part = sum - high;
    low += (high - (sum - part)) + (x - part) + error;
    high = sum;
  }
  __device__ void add_product(float a, float b) {
    const float product = __fmul_rn(a, b);  // which must not fuse with the sum
    add(product, fmaf(a, b, -product));
  }
  // Infinities and NaN have no error.
  __device__ float error() const { return isfinite(low) ? low : 0.0f; }
  __device__ float value() const { return high + error(); }
};

// The half of a token's channels that a thread owns, and its neighbour the other.
template <int D>
struct Half {
  static constexpr int kChannels = D / 2;
  int token, first;
  __device__ Half() : token(threadIdx.x / 2), first(threadIdx.x % 2 * kChannels) {}
  __device__ static Sum sum(const Sum& own) {
    Sum both = own;
    both.add(__shfl_xor_sync(0xffffffffu, own.high, 1), __shfl_xor_sync(0xffffffffu, own.low, 1));
    return both;
  }
};

template <int D>
__global__ void __launch_bounds__(kThreads, 2) grad_state_fp32_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kNumel = (D + 1) * D;
  float* kv = reinterpret_cast<float*>(shared);   // [D + 1, D]
  float* q = kv + kNumel;                         // q'
  float* grad = q + kTileTokensFp32 * kPitch<D>;  // grad_out, then grad_out / den
  float* grad_dens = grad + kTileTokensFp32 * kPitch<D>;
  float* states = grad_dens + kTileTokensFp32;
  const float* z = kv + D * D;
  const Place place(args);
  const float* state = args.states + place.pair(args) * kNumel;
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) kv[e] = state[e];
  const Plane<float> q_plane = part_of<float>(args.qkv[place.scale], place, D, 0);
  const Plane<float> grad_q_plane = part_of<float>(args.grad_qkv[place.scale], place, D, 0);
  const Plane<float> grad_plane(args.out, place.batch, place.group * D);
  const Half<D> half;
  StatePatch<D> patch;
  for (int tile = place.start; tile < place.stop; tile += kTileTokensFp32) {
    load_tile<D>(q, q_plane, tile, place.stop, true);
    load_tile<D>(grad, grad_plane, tile, place.stop, false);
    __syncthreads();
    const int n = tile + half.token;
    const float* own_q = q + half.token * kPitch<D>;
    float* own_grad = grad + half.token * kPitch<D>;
    Sum wide_den;
    for (int c = half.first; c < half.first + Half<D>::kChannels; ++c) wide_den.add_product(z[c], own_q[c]);
    wide_den = Half<D>::sum(wide_den);
    wide_den.add(n < place.stop ? args.eps : 1.0f, 0.0f);  // what is not there must not divide by an eps of 0
    const float den = wide_den.value();
    for (int c = half.first; c < half.first + Half<D>::kChannels; ++c) own_grad[c] /= den;
    __syncwarp();
    float grad_q[Half<D>::kChannels] = {};
    for (int row = 0; row < D; ++row) {
      const float grad_num = own_grad[row];
#pragma unroll
      for (int c = 0; c < Half<D>::kChannels; c += 4) {
        const float4 x = float4_at(kv + row * D + half.first + c);
        grad_q[c] += x.x * grad_num, grad_q[c + 1] += x.y * grad_num;
        grad_q[c + 2] += x.z * grad_num, grad_q[c + 3] += x.w * grad_num;
      }
    }
    Sum dot;
#pragma unroll
    for (int c = 0; c < Half<D>::kChannels; ++c) dot.add_product(own_q[half.first + c], grad_q[c]);
    dot = Half<D>::sum(dot);
    const float grad_den = -dot.value() / den;
    // What the division left over, of the sums as they are: -dot = (grad_den + rest) * den.
    const float left = fmaf(-grad_den, den, -dot.value()) - (dot.high - dot.value() + dot.error()) -
                       grad_den * (wide_den.high - den + wide_den.error());
    const float rest = isfinite(left / den) ? left / den : 0.0f;
    if (half.first == 0) grad_dens[half.token] = grad_den;
    if (n < place.stop) {
      float* p = grad_q_plane.data + half.first * grad_q_plane.stride_c + grad_q_plane.offset(n);
#pragma unroll
      for (int c = 0; c < Half<D>::kChannels; ++c) {
        const float sum = fmaf(rest, z[half.first + c], fmaf(grad_den, z[half.first + c], grad_q[c]));
        p[c * grad_q_plane.stride_c] = own_q[half.first + c] <= 0.0f ? 0.0f : sum;
      }
    }
    __syncthreads();
    patch.add(grad, q, grad_dens);
    __syncthreads();
  }
  patch.store(args.sums + (place.pair(args) * args.blocks + place.block) * kNumel, states);
}

template <int D>
__global__ void __launch_bounds__(kThreads, 2) grad_kv_fp32_kernel(ReluLinearAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  float* grad_state = reinterpret_cast<float*>(shared);  // [D + 1, D]
  float* k = grad_state + (D + 1) * D;
  float* v = k + kTileTokensFp32 * kPitch<D>;
  const Place place(args);
  add_up_splits<D>(args, place, nullptr, [=](int e, float sum) { grad_state[e] = sum; });
  const Plane<float> k_plane = part_of<float>(args.qkv[place.scale], place, D, 1);
  const Plane<float> v_plane = part_of<float>(args.qkv[place.scale], place, D, 2);
  const Plane<float> grad_k_plane = part_of<float>(args.grad_qkv[place.scale], place, D, 1);
  const Plane<float> grad_v_plane = part_of<float>(args.grad_qkv[place.scale], place, D, 2);
  const Half<D> half;
  constexpr int kChannels = Half<D>::kChannels;
  for (int tile = place.start; tile < place.stop; tile += kTileTokensFp32) {
    __syncthreads();  // before the next tile; the first time, after the state
    load_tile<D>(k, k_plane, tile, place.stop, true);
    load_tile<D>(v, v_plane, tile, place.stop, false);
    __syncthreads();
    const int n = tile + half.token;
    if (n >= place.stop) continue;
    const float* own_k = k + half.token * kPitch<D>;
    const float* own_v = v + half.token * kPitch<D>;
    float grad_k[kChannels], grad_v[kChannels] = {};
#pragma unroll
    for (int c = 0; c < kChannels; ++c) grad_k[c] = 0.0f;
    for (int row = 0; row < D; ++row) {
      const float x = own_v[row];
#pragma unroll
      for (int c = 0; c < kChannels; c += 4) {
        const float4 weight = float4_at(grad_state + row * D + half.first + c);
        grad_k[c] += weight.x * x, grad_k[c + 1] += weight.y * x;
        grad_k[c + 2] += weight.z * x, grad_k[c + 3] += weight.w * x;
      }
    }
    for (int c = 0; c < D; c += 4) {
      const float4 x = float4_at(own_k + c);
#pragma unroll
      for (int row = 0; row < kChannels; ++row) {
        const float4 weight = float4_at(grad_state + (half.first + row) * D + c);
        grad_v[row] += weight.x * x.x, grad_v[row] += weight.y * x.y;
        grad_v[row] += weight.z * x.z, grad_v[row] += weight.w * x.w;
      }
    }
    float* p_k = grad_k_plane.data + half.first * grad_k_plane.stride_c + grad_k_plane.offset(n);
    float* p_v = grad_v_plane.data + half.first * grad_v_plane.stride_c + grad_v_plane.offset(n);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float sum = grad_k[c] + grad_state[D * D + half.first + c];
      p_k[c * grad_k_plane.stride_c] = own_k[half.first + c] <= 0.0f ? 0.0f : sum;
      p_v[c * grad_v_plane.stride_c] = grad_v[c];
    }
  }
}

}  // namespace efficientvit_kernels::cuda
