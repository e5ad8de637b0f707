// lite_mla in two launches, for 16-bit storage, one scale and few channels: k and v of a tile are computed from x,
// aggregated and summed up; then q of a tile is, and the state is applied to it and the result projected. What is
// stored are the states and y. Device code only: the launcher is lite_mla.cu.
//
// A block of the first launch has one head; one of the second all heads of its pixels, each in a warp of its own, since
// the projection sums over them.
#pragma once

#include "aggregate_attention_apply_kernels.cuh"
#include "rows_product.cuh"

namespace efficientvit_kernels::cuda {

// `qkv`, `out` and `state` of the base are not used; `groups` are 2 * heads, the head's own first.
struct LiteMlaArgs : AggregateAttentionArgs {
  Image x, residual, y;     // [B, C, H, W], [B, O, H, W]; the residual's data may be null
  const void* qkv_weight;   // [heads * 3D, C], contiguous, aligned to 16 bytes
  const void* qkv_bias;     // [heads * 3D], or null
  const void* proj_weight;  // [O, 2 * heads * D], as qkv_weight
  const float* scale;       // [O], or null
  const float* shift;
  int channels, out_channels;
  Access x_access, y_access;  // of InputTile; to rows of pixels of y and the residual
};

// All of a halo, before what is within the image is written.
template <class T>
__device__ void clear(const Halo<T>& halo, int planes) {
  const uint32_t zeros[4] = {0, 0, 0, 0};
  for (int e = threadIdx.x; e < planes * halo.plane / 8; e += blockDim.x) store_words<4>(halo.data + 8 * e, zeros);
}

// W x + b, rounded as qkv is where it is stored, into planes of a halo; a column for evenness alone goes to its margin.
template <int kRowTiles, class T, class Plane, class Channel>
__device__ void project_input(const Halo<T>& to, const RowsOfWeight<T>& weight, const InputTile<T>& x,
                              const float* biases, const Window& window, Plane plane, Channel channel) {
  multiply_rows<kRowTiles>(weight, x, x.pixels(), [&](int row, int pixel, float sum) {
    const int at_row = x.y0 + pixel / x.cols - window.y0, at_column = x.x0 + pixel % x.cols - window.x0;
    const uint32_t word = Packed<T>::pack(sum + biases[channel(row)], 0.0f);
    store_element(to.at(plane(row), at_row, at_column), word);
  });
}

// sums[b, group, block] = KV and z, of the head's own k and v and of the aggregated.
template <class T, int D, int K>
__global__ void __launch_bounds__(kThreads, 2) lite_mla_state_kernel(LiteMlaArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kRowTiles = (D + 15) / 16, kPadded = 16 * kRowTiles, kMargin = halo_margin(sizeof(T));
  const HeadTiles place(args);
  const auto natural = [](int c) { return c; };
  const auto by_planes = [](int c) { return plane_of<D>(c); };
  uint32_t* weight = reinterpret_cast<uint32_t*>(shared);  // P_k as operand A
  float* k_taps = reinterpret_cast<float*>(weight + kPadded * D);
  float* v_taps = k_taps + D * K * tap_pitch(K);
  float* biases = v_taps + D * K * tap_pitch(K);  // of the aggregation: k's two, v's depthwise one
  float* qkv_biases = biases + 3 * D;             // of k and of v
  T* rows = reinterpret_cast<T*>(qkv_biases + 2 * D);
  const RowsOfWeight<T> k_rows{rows, D, args.channels};
  const RowsOfWeight<T> v_rows{rows + kPadded * k_rows.pitch(), D, args.channels};
  unsigned char* tile_memory = reinterpret_cast<unsigned char*>(v_rows.data + kPadded * v_rows.pitch());
  const int plane = halo_plane(args.rows, args.cols, K, kMargin, sizeof(T), 8);
  const Halo<T> k{reinterpret_cast<T*>(tile_memory), args.rows, args.cols, K / 2, kMargin, plane};
  const Halo<T> v{k.data + D * plane, args.rows, args.cols, K / 2, kMargin, plane};

  const int64_t k_first = place.channel(D, 1), v_first = place.channel(D, 2);
  const T* qkv_weight = static_cast<const T*>(args.qkv_weight);
  k_rows.load_async(qkv_weight, [=](int row) { return k_first + row; });
  v_rows.load_async(qkv_weight, [=](int row) { return v_first + row; });
  load_key_weights<T, D, K>(weight, k_taps, v_taps, biases, args, place);
  for (int c = threadIdx.x; c < D; c += blockDim.x) {
    qkv_biases[c] = bias_at<T>(args.qkv_bias, k_first + c);
    qkv_biases[D + c] = bias_at<T>(args.qkv_bias, v_first + c);
  }
  WarpState<D> stored, aggregated;
  for (int64_t tile = place.begin; tile < place.end; ++tile) {
    const Window window = place.window(args, tile);
    const InputTile<T> x(v.data + D * plane, args.channels, args.x_access == Access::kChannels, window, args.rows,
                         args.cols, K / 2);
    __syncthreads();  // what the last tile left has been read
    x.load_async(Channels<T>(args.x, place.batch, 0), args.x_access);
    cp_async_commit();
    clear(k, 2 * D);  // v's, too
    cp_async_wait<0>();
    __syncthreads();
    project_input<kRowTiles>(k, k_rows, x, qkv_biases, window, by_planes, natural);
    project_input<kRowTiles>(v, v_rows, x, qkv_biases + D, window, natural, natural);
    __syncthreads();
    add_stored<T, D>(stored, k, v, by_planes);
    if (static_cast<int>(threadIdx.x) / 32 * 64 < args.rows * args.cols) {
      AggregatedKeys<T, D, K> keys;
      keys.compute(k, k_taps, weight, biases, window);
      add_aggregated<T, D, K>(aggregated, keys, v, v_taps, biases + 2 * D, window);
    }
  }
  float* states = reinterpret_cast<float*>(tile_memory);
  store_sums<T, D>(stored, states, args, place, place.batch * args.groups + place.head, false);
  store_sums<T, D>(aggregated, states, args, place, place.pair(args), true);
}

// Results of the attention as operand B of the projection: of head h, planes of the halo from h * D on hold the rows of
// its own scale, then those of the aggregated one, each in the order of `plane_of`.
template <class T, int D>
struct ResultTile {
  T* data;
  int head_plane, plane, heads;  // values from a head to the next, from a row to the next

  __device__ T* head(int h) const { return data + h * head_plane; }
  __device__ void operand(uint32_t (&b)[4], int k, int pixel, int lane) const {
    const int row = k + lane % 16, scale = row / (heads * D), own = row % (heads * D);
    ldmatrix_x4_trans(b, head(own / D) + (scale * D + plane_of<D>(own % D)) * plane + pixel + lane / 16 * 8);
  }
};

// y of one tile.
template <class T, int D, int K>
__global__ void __launch_bounds__(32 * kBlockWarps, 1) lite_mla_apply_kernel(LiteMlaArgs args) {
  EVK_DYNAMIC_SHARED(shared);
  constexpr int kNumel = (D + 1) * D, kMargin = halo_margin(sizeof(T)), kRowTiles = 2, kChunkOfY = 16;
  const auto natural = [](int c) { return c; };
  const int heads = static_cast<int>(args.heads), width = heads * D;
  const int64_t batch = blockIdx.x / args.tiles;
  const int tile = static_cast<int>(blockIdx.x % args.tiles), tiles_x = static_cast<int>(args.tiles_x);
  const Window window{args.height, args.width, tile / tiles_x * args.rows, tile % tiles_x * args.cols};
  uint32_t* kv = reinterpret_cast<uint32_t*>(shared);  // [2, heads, D, D]: KV^T of the head's own scale, then the other
  uint32_t* weight = kv + 2 * width * D;               // [heads, D, D]: P_q
  float* z = reinterpret_cast<float*>(weight + width * D);  // [2, heads, D]
  float* biases = z + 2 * width;                            // [heads, 2D] of the aggregation; [heads, D] of qkv
  float* taps = biases + 3 * width;
  T* halos = reinterpret_cast<T*>(taps + width * K * tap_pitch(K));
  const int plane = halo_plane(args.rows, args.cols, K, kMargin, sizeof(T), 8), pixels = args.rows * args.cols;
  const Halo<T> halo{halos, args.rows, args.cols, K / 2, kMargin, plane};
  const RowsOfWeight<T> q_rows{halos + width * plane, width, args.channels};
  const InputTile<T> x(q_rows.data + padded_to(width, 16 * kRowTiles) * q_rows.pitch(), args.channels,
                       args.x_access == Access::kChannels, window, args.rows, args.cols, K / 2);

  q_rows.load_async(static_cast<const T*>(args.qkv_weight), [](int row) { return row / D * 3 * D + row % D; });
  x.load_async(Channels<T>(args.x, batch, 0), args.x_access);
  cp_async_commit();
  clear(halo, width);
  for (int e = threadIdx.x; e < 2 * heads * kNumel; e += blockDim.x) {
    const int group = e / kNumel, i = e % kNumel;
    const float* states = args.states + (batch * args.groups + group) * args.splits * kNumel;
    const float total = sum_of_splits(states, args.splits, kNumel, i);
    if (i < D * D) {
      kv[group * D * D + operand_index<D>(i % D, i / D)] = to_tf32(total);
    } else {
      z[group * D + i - D * D] = total;
    }
  }
  for (int head = 0; head < heads; ++head) {
    const int64_t first = int64_t{head} * 3 * D;
    load_query_weights<T, D, K>(weight + head * D * D, taps + head * D * K * tap_pitch(K), biases + head * 2 * D, args,
                                first);
  }
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    biases[2 * width + c] = bias_at<T>(args.qkv_bias, c / D * 3 * D + c % D);
  }
  cp_async_wait<0>();
  __syncthreads();
  project_input<kRowTiles>(
      halo, q_rows, x, biases + 2 * width, window, [](int row) { return row / D * D + plane_of<D>(row % D); }, natural);
  __syncthreads();  // x and W_q have been read

  const RowsOfWeight<T> rows{q_rows.data, args.out_channels, 2 * width};
  T* staged = rows.data + padded_to(args.out_channels, 16 * kRowTiles) * rows.pitch();
  const Halo<T> y{staged, args.rows, args.cols, 0, 0, tile_plane(pixels, sizeof(T))};
  rows.load_async(static_cast<const T*>(args.proj_weight), [](int row) { return row; });
  cp_async_commit();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, across = args.cols / 8;
  const int head = warp % heads, segment = warp / heads * 8 + lane / 4;
  const bool works = segment * 8 < pixels;  // the whole warp, or none of it
  const ResultTile<T, D> results{halos, D * plane, result_plane(pixels), heads};
  TokenFragment<T, D, Access::kTokens> stored;
  AggregatedQueries<T, D, K> aggregated;
  if (works) {
    const T* own = halo.at(head * D + t, segment / across, segment % across * 8);
#pragma unroll
    for (int i = 0; i < D / 4; ++i) load_words<4>(stored.x.words + 4 * i, own + 4 * i * plane);
    stored.x.relu();
    aggregated.compute(own, plane, halo.pitch(), taps + head * D * K * tap_pitch(K), weight + head * D * D,
                       biases + head * 2 * D);
  }
  __syncthreads();  // all of the halo has been read
  if (works) {
    T* to = results.head(head);
    attend<T, D>(to, results.plane, segment, kv + head * D * D, z + head * D, args.eps,
                 [&](int i, int step) { return stored.quad(i, step); });
    attend<T, D>(to + D * results.plane, results.plane, segment, kv + (heads + head) * D * D, z + (heads + head) * D,
                 args.eps, [&](int i, int step) { return aggregated.quad(i, step); });
  }
  if (args.residual.data != nullptr) {
    for (int c = 0; c < args.out_channels; c += kChunkOfY) {
      const Halo<T> part{y.data + c * y.plane, y.rows, y.cols, 0, 0, y.plane};
      load_halo<kChunkOfY>(part, Channels<T>(args.residual, batch, c), window, args.y_access, natural);
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  multiply_rows<kRowTiles>(rows, results, pixels, [&](int c, int pixel, float sum) {
    T* to = y.data + c * y.plane + pixel;
    if (args.scale != nullptr) sum *= args.scale[c];
    if (args.shift != nullptr) sum += args.shift[c];
    if (args.residual.data != nullptr) sum += value_of(to);
    store_element(to, Packed<T>::pack(sum, 0.0f));
  });
  __syncthreads();
  for (int c = 0; c < args.out_channels; c += kChunkOfY) {
    store_tile<kChunkOfY>(Channels<T>(args.y, batch, c), y.data + c * y.plane, y.plane, args.rows, args.cols, window,
                          args.y_access, natural);
  }
}

}  // namespace efficientvit_kernels::cuda
