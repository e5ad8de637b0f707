// What lies between the products of lite_mla, for 16-bit storage and one scale, in two launches: the aggregation of k
// and v with the sum of the states, the aggregation of q with their application. Aggregated tokens are never stored.
// Device code only: the launcher is aggregate_attention.cu.
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

  __device__ void add(int tile, int column, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t b[2] = {b0, b1};
    mma_m16n8k8_tf32(acc[tile][column], a, b);
  }
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

// Scale 0: k and v as they are stored. Lane t has 8 neighbouring pixels, row g a channel.
template <class T, int D>
__device__ void add_stored(WarpState<D>& sum, const Halo<T>& k, const Halo<T>& v) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, across = k.cols / 8;
  for (int first = threadIdx.x / 32 * 4; first < k.rows * across; first += blockDim.x / 8) {
    const int row = (first + t) / across, column = (first + t) % across * 8;
    uint32_t rows[2 * WarpState<D>::kTiles][4], columns[D / 8][4];
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      load_words<4>(rows[i], v.at(8 * i + g, row, column));
      load_words<4>(columns[i], k.at(8 * i + g, row, column));
#pragma unroll
      for (uint32_t& word : columns[i]) {
        word = Packed<T>::relu(word);
        sum.z[i] += Packed<T>::low(word) + Packed<T>::high(word);
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int tile = 0; tile < WarpState<D>::kTiles; ++tile) {
        const uint32_t low = rows[2 * tile][step], high = D > 8 ? rows[2 * tile + 1][step] : 0;
        const uint32_t a[4] = {__float_as_uint(Packed<T>::low(low)), __float_as_uint(Packed<T>::low(high)),
                               __float_as_uint(Packed<T>::high(low)), __float_as_uint(Packed<T>::high(high))};
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
          sum.add(tile, i, a, __float_as_uint(Packed<T>::low(columns[i][step])),
                  __float_as_uint(Packed<T>::high(columns[i][step])));
        }
      }
    }
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
        sum.add(tile, column, a, to_tf32(k[0]), to_tf32(k[1]));
      }
    }
  }
}

// sums[b, group, block] = the block's part of KV and z.
template <class T, int D, int K>
__global__ void __launch_bounds__(kThreads, 2) aggregate_kv_state_kernel(AggregateAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kNumel = (D + 1) * D, kTiles = WarpState<D>::kTiles;
  const HeadTiles place(args);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto natural = [](int c) { return c; };
  uint32_t* weight = reinterpret_cast<uint32_t*>(shared);  // P_k as operand A, at least 16 rows
  float* k_taps = reinterpret_cast<float*>(weight + kTiles * 16 * D);
  float* v_taps = k_taps + D * K * tap_pitch(K);
  float* biases = v_taps + D * K * tap_pitch(K);  // k's two, v's depthwise one
  unsigned char* tile_memory = reinterpret_cast<unsigned char*>(biases + 3 * D);
  const int64_t k_first = place.channel(D, 1), v_first = place.channel(D, 2);
  const T *depthwise = static_cast<const T*>(args.depthwise), *pointwise = static_cast<const T*>(args.pointwise);
  WarpState<D> sum;

  if (place.aggregates) {
    constexpr int kMargin = halo_margin(sizeof(T));
    for (int e = threadIdx.x; e < kTiles * 16 * D; e += blockDim.x) {
      // e = ((tile, step), lane, i): row g + 8 (i % 2), channel 2 * step + i / 2 of lane t.
      const int i = e % 4, of_lane = e / 4 % 32, step = e / 128 % (D / 8), tile = e / 128 / (D / 8);
      const int o = 16 * tile + i % 2 * 8 + of_lane / 4, c = of_lane % 4 * (D / 4) + 2 * step + i / 2;
      weight[e] = o < D ? __float_as_uint(value_of(pointwise + (k_first + o) * D + c)) : 0u;
    }
    load_all_taps<D, K>(k_taps, depthwise, k_first, [](int c) { return plane_of<D>(c); });
    load_all_taps<D, K>(v_taps, depthwise, v_first, natural);
    for (int c = threadIdx.x; c < D; c += blockDim.x) {
      biases[plane_of<D>(c)] = bias_at<T>(args.depthwise_bias, k_first + c);
      biases[D + c] = bias_at<T>(args.pointwise_bias, k_first + c);
      biases[2 * D + c] = bias_at<T>(args.depthwise_bias, v_first + c);
    }
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
      add_stored<T, D>(sum, k, v);
    }
  }

  // The warps' sums, then v's P.
  float* to = args.sums + (place.pair(args) * args.splits + place.block) * kNumel;
  float* states = reinterpret_cast<float*>(tile_memory);  // [warps, D + 1, D], then their sum
  float* total = states + warps * kNumel;
  __syncthreads();
  sum.store(states + warp * kNumel, lane);
  __syncthreads();
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const float x = sum_of_splits(states, warps, kNumel, e);
    (place.aggregates ? total : to)[e] = x;
  }
  if (!place.aggregates) return;
  __syncthreads();
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const int row = e / D, column = e % D;
    const float z = total[D * D + column];
    if (row == D) {
      to[e] = z;
      continue;
    }
    float kv = 0.0f;
#pragma unroll 4
    for (int c = 0; c < D; ++c) kv += value_of(pointwise + (v_first + row) * D + c) * total[c * D + column];
    to[e] = args.pointwise_bias == nullptr ? kv : kv + bias_at<T>(args.pointwise_bias, v_first + row) * z;
  }
}

// out = KV q' / (z . q' + eps) for pairs of a lane's pixels, where query(i, step) gives the quad of pair i of q'.
template <class T, int D, class Query>
__device__ void attend(T* staged, int plane, const uint32_t* weight, const float* z, float eps, Query query) {
  const int lane = threadIdx.x % 32, t = lane % 4, segment = static_cast<int>(threadIdx.x) / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float den[2] = {0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < D / 8; ++step) {
      const Quad q = query(i, step);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float weight_of_den = shared_float(z + t * (D / 4) + 2 * step + e);
        den[0] += weight_of_den * q.v[0][e], den[1] += weight_of_den * q.v[1][e];
      }
    }
    float num[D / 8][4] = {};
    multiply<D>(num, {weight}, lane, [&](int step) { return query(i, step); });
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

// out for one tile; the first block of a head stores the added-up state.
template <class T, int D, int K>
__global__ void __launch_bounds__(kThreads, 2) aggregate_apply_kernel(AggregateAttentionArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kNumel = (D + 1) * D, kMargin = halo_margin(sizeof(T));
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

  const float* states = args.states + place.pair(args) * args.splits * kNumel;
  float* state = args.state != nullptr && place.block == 0 ? args.state + place.pair(args) * kNumel : nullptr;
  for (int e = threadIdx.x; e < kNumel; e += blockDim.x) {
    const float total = sum_of_splits(states, args.splits, kNumel, e);
    if (state != nullptr) state[e] = total;
    if (e < D * D) {
      kv[operand_index<D>(e % D, e / D)] = to_tf32(total);
    } else {
      z[e - D * D] = total;
    }
  }
  if (place.aggregates) {
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
  load_halo<D>(halo, Channels<T>(args.qkv, place.batch, first), window, args.access, place_of);
  __syncthreads();

  const int lane = threadIdx.x % 32, t = lane % 4, across = args.cols / 8;
  const int segment = static_cast<int>(threadIdx.x) / 4;
  const T* own = halo.at(t, segment / across, segment % across * 8);
  const int plane = tile_plane(args.rows * args.cols, sizeof(T));
  if (place.aggregates) {
    float q[4][D / 8][4] = {};
#pragma unroll 1
    for (int step = 0; step < D / 8; ++step) {
      uint32_t a[4][4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 4 * (2 * step + e);
        float sums[8];
#pragma unroll
        for (float& sum : sums) sum = biases[at + t];
        convolve<8, K>(sums, own + at * halo.plane, halo.pitch(), taps + (at + t) * K * tap_pitch(K));
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
    __syncthreads();  // the halo has been read
    attend<T, D>(halo.data, plane, kv, z, args.eps, [&](int i, int step) {
      const float (&x)[4] = q[i][step];
      return Quad{{{x[0], x[1]}, {x[2], x[3]}}};
    });
  } else {
    uint32_t words[D / 4][4];
#pragma unroll
    for (int i = 0; i < D / 4; ++i) {
      load_words<4>(words[i], own + 4 * i * halo.plane);
#pragma unroll
      for (uint32_t& word : words[i]) word = Packed<T>::relu(word);
    }
    __syncthreads();
    attend<T, D>(halo.data, plane, kv, z, args.eps, [&](int i, int step) {
      const uint32_t even = words[2 * step][i], odd = words[2 * step + 1][i];
      return Quad{{{Packed<T>::low(even), Packed<T>::low(odd)}, {Packed<T>::high(even), Packed<T>::high(odd)}}};
    });
  }
  __syncthreads();
  store_tile<D>(Channels<T>(args.out, place.batch, place.group * D), halo.data, plane, args.rows, args.cols, window,
                args.out_access, place_of);
}

}  // namespace efficientvit_kernels::cuda
