// The second of two kernels for what lies between the products of lite_mla: the aggregation of q with the application
// of the state. See aggregate_attention_state_kernels.cuh.
#pragma once

#include "aggregate_attention_state_kernels.cuh"

namespace efficientvit_kernels::cuda {

// out = KV q' / (z . q' + eps) for pairs of a lane's pixels, where query(i, step) gives the quad of pair i of q'.
// Staged by planes of `plane` values, the lane's 8 pixels as segment `segment` of each.
template <class T, int D, class Query>
__device__ void attend(T* staged, int plane, int segment, const uint32_t* weight, const float* z, float eps,
                       Query query) {
  const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float den[2] = {0.0f, 0.0f};
    const auto quad = [&](int step) { return query(i, step); };
    add_denominators<D>(den, z, lane, quad);
    float num[D / 8][4] = {};
    multiply<D>(num, {weight}, lane, quad);
    const Divisor divisors[2] = {Divisor(sum_of_row(den[0]) + eps), Divisor(sum_of_row(den[1]) + eps)};
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t word = Packed<T>::pack(divisors[0].divide(num[j][e]), divisors[1].divide(num[j][2 + e]));
        store_words<1>(staged + (4 * (2 * j + e) + t) * plane + segment * 8 + 2 * i, &word);
      }
    }
  }
}

// The aggregated q' of a lane: 8 neighbouring pixels, in pairs, by its channels.
template <class T, int D, int K>
struct AggregatedQueries {
  float q[4][D / 8][4] = {};

  __device__ Quad quad(int i, int step) const {
    const float (&x)[4] = q[i][step];
    return {{{x[0], x[1]}, {x[2], x[3]}}};
  }

  // own: the lane's first pixel in its first plane, of planes `plane` and rows `pitch` apart. weight: P_q as operand B.
  __device__ void compute(const T* own, int plane, int pitch, const float* taps, const uint32_t* weight,
                          const float* biases) {
    const int lane = threadIdx.x % 32, t = lane % 4;
#pragma unroll 1
    for (int step = 0; step < D / 8; ++step) {
      uint32_t a[4][4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 4 * (2 * step + e);
        float sums[8];
#pragma unroll
        for (float& sum : sums) sum = biases[at + t];
        convolve<8, K>(sums, own + at * plane, pitch, taps + (at + t) * K * tap_pitch(K));
#pragma unroll
        for (int i = 0; i < 8; ++i) a[i / 2][i % 2 + 2 * e] = to_tf32(sums[i]);
      }
#pragma unroll
      for (int column = 0; column < D / 8; ++column) {
        uint32_t b[2];
        shared_pair(b, weight + ((step * (D / 8) + column) * 32 + lane) * 2);
#pragma unroll
        for (int i = 0; i < 4; ++i) mma_m16n8k8_tf32(q[i][column], a[i], b);
      }
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float bias = biases[D + t * (D / 4) + 2 * j + e];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float& x = q[i][j][2 * h + e];
            x = __uint_as_float(to_tf32(relu(x + bias)));
          }
        }
      }
    }
  }
};

// What the aggregation of q takes, of the channels from `first` on: P_q as operand B, the taps and the depthwise biases
// by planes, P_q's biases behind them.
template <class T, int D, int K>
__device__ void load_query_weights(uint32_t* weight, float* taps, float* biases, const AggregateAttentionArgs& args,
                                   int64_t first) {
  const auto place_of = [](int c) { return plane_of<D>(c); };
  for (int e = threadIdx.x; e < D * D; e += blockDim.x) {
    weight[operand_index<D>(e % D, e / D)] =
        __float_as_uint(value_of(static_cast<const T*>(args.pointwise) + first * D + e));
  }
  load_all_taps<D, K>(taps, static_cast<const T*>(args.depthwise), first, place_of);
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    biases[place_of(c)] = bias_at<T>(args.depthwise_bias, first + c);
    biases[D + c] = bias_at<T>(args.pointwise_bias, first + c);
  }
}

// out for one tile; the first block of a head stores the added-up state.
template <class T, int D, int K>
__global__ void __launch_bounds__(kThreads, 2) aggregate_apply_kernel(AggregateAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kMargin = halo_margin(sizeof(T));
  const auto place_of = [](int c) { return plane_of<D>(c); };
  const HeadTiles place(args);
  const int64_t first = place.channel(D, 0);
  uint32_t* kv = reinterpret_cast<uint32_t*>(shared);  // KV^T: from q's channels to out's
  uint32_t* weight = kv + D * D;                       // P_q
  float* z = reinterpret_cast<float*>(weight + D * D);
  float* biases = z + D;  // of the depthwise convolution by planes, of P_q by channels
  float* taps = biases + 2 * D;
  const int pad = place.aggregates ? K / 2 : 0, margin = place.aggregates ? kMargin : 0;
  const Halo<T> halo{reinterpret_cast<T*>(taps + D * K * tap_pitch(K)),
                     args.rows,
                     args.cols,
                     pad,
                     margin,
                     halo_plane(args.rows, args.cols, 2 * pad + 1, margin, sizeof(T), 8)};
  const Window window = place.window(args, place.begin);

  load_state<D>(kv, z, args, place);
  if (place.aggregates) {
    load_query_weights<T, D, K>(weight, taps, biases, args, first);
  }
  load_halo<D>(halo, Channels<T>(args.qkv, place.batch, first), window, args.access, place_of);
  __syncthreads();

  const int across = args.cols / 8, t = threadIdx.x % 4, segment = static_cast<int>(threadIdx.x) / 4;
  const T* own = halo.at(t, segment / across, segment % across * 8);
  const int plane = tile_plane(args.rows * args.cols, sizeof(T));
  if (place.aggregates) {
    AggregatedQueries<T, D, K> q;
    q.compute(own, halo.plane, halo.pitch(), taps, weight, biases);
    __syncthreads();  // the halo has been read
    attend<T, D>(halo.data, plane, segment, kv, z, args.eps, [&](int i, int step) { return q.quad(i, step); });
  } else {
    TokenFragment<T, D, Access::kTokens> q;
#pragma unroll
    for (int i = 0; i < D / 4; ++i) load_words<4>(q.x.words + 4 * i, own + 4 * i * halo.plane);
    q.x.relu();
    __syncthreads();
    attend<T, D>(halo.data, plane, segment, kv, z, args.eps, [&](int i, int step) { return q.quad(i, step); });
  }
  __syncthreads();
  store_tile<D>(Channels<T>(args.out, place.batch, place.group * D), halo.data, plane, args.rows, args.cols, window,
                args.out_access, place_of);
}

}  // namespace efficientvit_kernels::cuda
