// The first of two kernels for what lies between the products of lite_mla, for 16-bit storage and one scale: the
// aggregation of k and v with the sum of the states. aggregate_attention_apply_kernels.cuh has the second. Aggregated
// tokens are never stored. Device code only: the launcher is aggregate_attention.cu.
//
// A block has one head, on tiles of an image. With the first scale come blocks for the head's own q, k and v, which
// no convolution touches (scale 0 of the attention).
//
// k' = relu(P_k (D * k + b) + c) is computed with channels as rows, so that it leaves the matrix units as what operand
// B of the sum over tokens takes. v has no relu, so its P moves behind that sum: KV = P_v (sum (D * v + b) k'^T) + c
// z^T. Everything enters the matrix units in TF32, which holds P and the stored q, k and v exactly.
#pragma once

#include "image_tile.cuh"
#include "operands.cuh"

namespace efficientvit_kernels::cuda {

struct AggregateAttentionArgs {
  Image qkv;                   // [B, heads * 3D, H, W]
  Image out;                   // [B, G * D, H, W]
  const void* depthwise;       // [heads * 3D, K, K], contiguous as all weights
  const void* pointwise;       // [heads * 3D, D]
  const void* depthwise_bias;  // [heads * 3D], or null
  const void* pointwise_bias;
  const float* states;  // [B, G, splits, D + 1, D], to be added up
  float* sums;          // the same, as the state kernel writes them
  float* state;         // [B, G, D + 1, D], or null: where the added-up state is stored
  int64_t groups, heads, splits;
  int64_t first_group;            // of this scale
  int64_t tiles_x, tiles;         // of an image
  int64_t tiles_per_block;        // 1 for the application
  int64_t blocks;                 // per head and image
  int64_t aggregated;             // blocks that aggregate; those after them have scale 0
  int height, width, rows, cols;  // of an image, of a tile
  float eps;
  Access access, out_access;  // to rows of pixels of qkv and of out
};

// What a block has to do.
struct HeadTiles {
  int64_t batch, head, group, block, begin, end;  // tiles begin to end - 1
  bool aggregates;

  __device__ explicit HeadTiles(const AggregateAttentionArgs& args) {
    const int64_t id = blockIdx.x;
    aggregates = id < args.aggregated;
    const int64_t own = aggregates ? id : id - args.aggregated;
    block = own % args.blocks, head = own / args.blocks % args.heads, batch = own / args.blocks / args.heads;
    group = (aggregates ? args.first_group : 0) + head;
    begin = block * args.tiles_per_block, end = min(begin + args.tiles_per_block, args.tiles);
  }
  __device__ int64_t pair(const AggregateAttentionArgs& args) const { return batch * args.groups + group; }
  // The first channel of q, k or v (part 0, 1, 2) in qkv.
  __device__ int64_t channel(int head_dim, int part) const { return (head * 3 + part) * head_dim; }
  __device__ Window window(const AggregateAttentionArgs& args, int64_t tile) const {
    return {args.height, args.width, static_cast<int>(tile / args.tiles_x) * args.rows,
            static_cast<int>(tile % args.tiles_x) * args.cols};
  }
};

// A warp's sum of v k'^T (16 rows of v by 8 columns of k' in each product) and of k', over its 64 pixels of a tile.
template <int D>
struct WarpState {
  static constexpr int kTiles = (D + 15) / 16;
  float acc[kTiles][D / 8][4] = {};
  float z[2 * kTiles] = {};  // of channel 8 * i + g, over the lane's own pixels

  // Into a [D + 1, D] state.
  __device__ void store(float* state, int lane) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int column = 0; column < D / 8; ++column) {
#pragma unroll
        for (int i = 0; i < (D > 8 ? 4 : 2); ++i) {
          state[(16 * tile + i / 2 * 8 + g) * D + 8 * column + 2 * t + i % 2] = acc[tile][column][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float total = sum_of_row(z[i]);
      if (t == 0) state[D * D + 8 * i + g] = total;
    }
  }
};

// Scale 0: k and v as they are stored, channel c of k in plane place(c). Lane t has 8 neighbouring pixels, row g a
// channel.
template <class T, int D, class Place>
__device__ void add_stored(WarpState<D>& sum, const Halo<T>& k, const Halo<T>& v, Place place) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, across = k.cols / 8;
  for (int first = threadIdx.x / 32 * 4; first < k.rows * across; first += blockDim.x / 8) {
    const int row = (first + t) / across, column = (first + t) % across * 8;
    Words<T, 8, D / 8, Access::kTokens> keys, values;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      load_words<4>(keys.words + 4 * i, k.at(place(8 * i + g), row, column));
      load_words<4>(values.words + 4 * i, v.at(8 * i + g, row, column));
    }
    keys.relu();
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int slot = 0; slot < 8; slot += 2) {
        const float2 both = keys.tokens(slot, i);
        sum.z[i] += both.x + both.y;
      }
    }
    multiply_over_tokens<D, D>(
        sum.acc, [&](int step, int i) { return values.tokens(2 * step, i); },
        [&](int step, int i) { return keys.tokens(2 * step, i); });
  }
}

// The aggregated k' of a warp's 64 pixels, as results of products: rows channels, columns segments of 8 pixels, one
// product for each of their pixels; of row g, lane t has segments 2t and 2t + 1. 0 outside the image.
template <class T, int D, int K>
struct AggregatedKeys {
  static constexpr int kTiles = (D + 15) / 16;
  float x[kTiles][8][4] = {};

  // weight: P_k as operand A; biases: of the depthwise convolution by planes, of P_k by channels.
  __device__ void compute(const Halo<T>& k, const float* taps, const uint32_t* weight, const float* biases,
                          const Window& window) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, across = k.cols / 8;
    const int segment = static_cast<int>(threadIdx.x) / 4;
    const T* own = k.at(t, segment / across, segment % across * 8);
#pragma unroll 1
    for (int step = 0; step < D / 8; ++step) {
      uint32_t d[2][8];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 4 * (2 * step + e);
        float sums[8];
#pragma unroll
        for (float& sum : sums) sum = biases[at + t];
        convolve<8, K, 1>(sums, own + at * k.plane, k.pitch(), taps + (at + t) * K * tap_pitch(K));
#pragma unroll
        for (int i = 0; i < 8; ++i) d[e][i] = to_tf32(sums[i]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[4];
        load_words<4>(a, weight + ((tile * (D / 8) + step) * 32 + lane) * 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t b[2] = {d[0][i], d[1][i]};
          mma_m16n8k8_tf32(x[tile][i], a, b);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int at = static_cast<int>(threadIdx.x) / 32 * 8 + 2 * t + j, row = at / across, column = at % across * 8;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int half = 0; half < (D > 8 ? 2 : 1); ++half) {
          const float bias = biases[D + 16 * tile + 8 * half + g];
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& value = x[tile][i][2 * half + j];
            value = window.shows(row, column + i) ? relu(value + bias) : 0.0f;
          }
        }
      }
    }
  }
};

// += the aggregated v (without its P) times k'.
template <class T, int D, int K>
__device__ void add_aggregated(WarpState<D>& sum, const AggregatedKeys<T, D, K>& keys, const Halo<T>& v,
                               const float* taps, const float* biases, const Window& window) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, across = v.cols / 8;
#pragma unroll
  for (int i = 0; i < D / 8; ++i) {
#pragma unroll
    for (int pixel = 0; pixel < 8; ++pixel) {
      sum.z[i] += keys.x[i / 2][pixel][i % 2 * 2] + keys.x[i / 2][pixel][i % 2 * 2 + 1];
    }
  }
#pragma unroll
  for (int tile = 0; tile < WarpState<D>::kTiles; ++tile) {
    uint32_t rows[2][2][8] = {};  // [half][segment][pixel]
#pragma unroll
    for (int half = 0; half < (D > 8 ? 2 : 1); ++half) {
      const int c = 16 * tile + 8 * half + g;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = static_cast<int>(threadIdx.x) / 32 * 8 + 2 * t + j, row = at / across, column = at % across * 8;
        float sums[8];
#pragma unroll
        for (float& x : sums) x = biases[c];
        convolve<8, K, 1>(sums, v.at(c, row, column), v.pitch(), taps + c * K * tap_pitch(K));
#pragma unroll
        for (int i = 0; i < 8; ++i) rows[half][j][i] = window.shows(row, column + i) ? to_tf32(sums[i]) : 0u;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t a[4] = {rows[0][0][i], rows[1][0][i], rows[0][1][i], rows[1][1][i]};
#pragma unroll
      for (int column = 0; column < D / 8; ++column) {
        const float* k = &keys.x[column / 2][i][column % 2 * 2];
        const uint32_t b[2] = {to_tf32(k[0]), to_tf32(k[1])};
        mma_m16n8k8_tf32(sum.acc[tile][column], a, b);
      }
    }
  }
}

// What the aggregation of k and v takes, into shared memory: P_k as operand A, of at least 16 rows; the taps; `biases`,
// k's depthwise one by planes and its pointwise one, and v's depthwise one.
template <class T, int D, int K>
__device__ void load_key_weights(uint32_t* weight, float* k_taps, float* v_taps, float* biases,
                                 const AggregateAttentionArgs& args, const HeadTiles& place) {
  const int64_t k_first = place.channel(D, 1), v_first = place.channel(D, 2);
  const T *depthwise = static_cast<const T*>(args.depthwise), *pointwise = static_cast<const T*>(args.pointwise);
  for (int e = threadIdx.x; e < WarpState<D>::kTiles * 16 * D; e += blockDim.x) {
    // e = ((tile, step), lane, i): row g + 8 (i % 2), channel 2 * step + i / 2 of lane t.
    const int i = e % 4, of_lane = e / 4 % 32, step = e / 128 % (D / 8), tile = e / 128 / (D / 8);
    const int o = 16 * tile + i % 2 * 8 + of_lane / 4, c = of_lane % 4 * (D / 4) + 2 * step + i / 2;
    weight[e] = o < D ? __float_as_uint(value_of(pointwise + (k_first + o) * D + c)) : 0u;
  }
  load_all_taps<D, K>(k_taps, depthwise, k_first, [](int c) { return plane_of<D>(c); });
  load_all_taps<D, K>(v_taps, depthwise, v_first, [](int c) { return c; });
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    biases[plane_of<D>(c)] = bias_at<T>(args.depthwise_bias, k_first + c);
    biases[D + c] = bias_at<T>(args.pointwise_bias, k_first + c);
    biases[2 * D + c] = bias_at<T>(args.depthwise_bias, v_first + c);
  }
}

// The warps' sums, added up into sums[pair, block], and with `aggregated` v's P. `states`: [warps + 1, D + 1, D] of
// shared memory, which is no longer read by then.
template <class T, int D>
__device__ void store_sums(const WarpState<D>& sum, float* states, const AggregateAttentionArgs& args,
                           const HeadTiles& place, int64_t pair, bool aggregated) {
  constexpr int kNumel = (D + 1) * D;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* to = args.sums + (pair * args.splits + place.block) * kNumel;
  float* total = states + warps * kNumel;
  __syncthreads();
  sum.store(states + warp * kNumel, threadIdx.x % 32);
  __syncthreads();
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const float x = sum_of_splits(states, warps, kNumel, e);
    (aggregated ? total : to)[e] = x;
  }
  if (!aggregated) return;
  __syncthreads();
  const int64_t first = place.channel(D, 2);
  const T* pointwise = static_cast<const T*>(args.pointwise) + first * D;
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const int row = e / D, column = e % D;
    const float z = total[D * D + column];
    if (row == D) {
      to[e] = z;
      continue;
    }
    float kv = 0.0f;
#pragma unroll 4
    for (int c = 0; c < D; ++c) kv += value_of(pointwise + row * D + c) * total[c * D + column];
    to[e] = args.pointwise_bias == nullptr ? kv : kv + bias_at<T>(args.pointwise_bias, first + row) * z;
  }
}

// sums[b, group, block] = the block's part of KV and z.
template <class T, int D, int K>
__global__ void __launch_bounds__(kThreads, 2) aggregate_kv_state_kernel(AggregateAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kTiles = WarpState<D>::kTiles;
  const HeadTiles place(args);
  const auto natural = [](int c) { return c; };
  uint32_t* weight = reinterpret_cast<uint32_t*>(shared);  // P_k as operand A, at least 16 rows
  float* k_taps = reinterpret_cast<float*>(weight + kTiles * 16 * D);
  float* v_taps = k_taps + D * K * tap_pitch(K);
  float* biases = v_taps + D * K * tap_pitch(K);  // k's two, v's depthwise one
  unsigned char* tile_memory = reinterpret_cast<unsigned char*>(biases + 3 * D);
  const int64_t k_first = place.channel(D, 1), v_first = place.channel(D, 2);
  WarpState<D> sum;

  if (place.aggregates) {
    constexpr int kMargin = halo_margin(sizeof(T));
    load_key_weights<T, D, K>(weight, k_taps, v_taps, biases, args, place);
    const Halo<T> halo{reinterpret_cast<T*>(tile_memory),
                       args.rows,
                       args.cols,
                       K / 2,
                       kMargin,
                       halo_plane(args.rows, args.cols, K, kMargin, sizeof(T), 8)};
    for (int64_t tile = place.begin; tile < place.end; ++tile) {
      const Window window = place.window(args, tile);
      __syncthreads();  // what the last tile left has been read
      load_halo<D>(halo, Channels<T>(args.qkv, place.batch, k_first), window, args.access,
                   [](int c) { return plane_of<D>(c); });
      __syncthreads();
      AggregatedKeys<T, D, K> keys;
      keys.compute(halo, k_taps, weight, biases, window);
      __syncthreads();  // k has been read
      load_halo<D>(halo, Channels<T>(args.qkv, place.batch, v_first), window, args.access, natural);
      __syncthreads();
      add_aggregated<T, D, K>(sum, keys, halo, v_taps, biases + 2 * D, window);
    }
  } else {
    const int plane = halo_plane(args.rows, args.cols, 1, 0, sizeof(T), 4);
    const Halo<T> k{reinterpret_cast<T*>(tile_memory), args.rows, args.cols, 0, 0, plane};
    const Halo<T> v{k.data + D * plane, args.rows, args.cols, 0, 0, plane};
    for (int64_t tile = place.begin; tile < place.end; ++tile) {
      const Window window = place.window(args, tile);
      __syncthreads();
      load_halo<D>(k, Channels<T>(args.qkv, place.batch, k_first), window, args.access, natural);
      load_halo<D>(v, Channels<T>(args.qkv, place.batch, v_first), window, args.access, natural);
      __syncthreads();
      add_stored<T, D>(sum, k, v, natural);
    }
  }

  store_sums<T, D>(sum, reinterpret_cast<float*>(tile_memory), args, place, place.pair(args), place.aggregates);
}

}  // namespace efficientvit_kernels::cuda
