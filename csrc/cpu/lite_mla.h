// The LiteMLA block on the CPU, from qkv on: what the launcher hands to the kernels of one instruction set.
//
// Axes: B images, S aggregation scales, heads, D head dim, G = heads * (1 + S) groups, scale-major; scale 0 is qkv
// itself. Per group: state = [KV; z] as in relu_linear_attention.h, of the aggregated k and v. Then, with K = G * D
// channels
//   att[g * D + d, n] = (sum_j KV[d, j] q'[j, n]) / (z . q'_n + eps),   y = (W att) * scale + shift + residual.
// v's pointwise convolution has no relu behind it, so it is applied to the sum over tokens: KV = P_v (sum_n u_n k'_n^T)
// + c_v z^T. Where an image has more tokens than y has channels, W KV is multiplied first, once per image: the "fold".
#pragma once

#include <cstdint>

#include "image.h"
#include "isa.h"
#include "multiscale_aggregate.h"
#include "plan.h"
#include "pointwise.h"

namespace efficientvit_kernels::cpu {

struct LiteMlaArgs {
  ImageTensor qkv;  // [B, heads * 3 * D, H, W]
  const AggregateScale* scales;
  int64_t num_scales, heads, head_dim, height, width;
  double eps;
  void* state;    // [B * G, D + 1, D], compute type
  void* partial;  // [chunks - 1, B * G, D + 1, D]

  // The projection. packed: row panels of W, [C_out, K], for the fold; folded: those of W KV, one set per image, or
  // null.
  void *packed, *folded;
  int64_t folded_numel;
  ImageTensor y, residual;    // NCHW or channels_last, both the same; residual.data may be null
  const void *scale, *shift;  // compute type, or null
  int64_t out_channels;

  int64_t groups() const { return heads * (1 + num_scales); }
  int64_t width_k() const { return groups() * head_dim; }
  int64_t state_numel() const { return (head_dim + 1) * head_dim; }
  int64_t max_pad() const {
    int64_t pad = 0;
    for (int64_t s = 0; s < num_scales; ++s) pad = scales[s].pad() > pad ? scales[s].pad() : pad;
    return pad;
  }
};

struct LiteMlaKernels {
  using Bytes = int64_t (*)(const LiteMlaArgs&, const TileGrid&);
  // Sums [KV; z] of group g over tiles [tile0, tile1) into `sum`; v's pointwise convolution is still to come.
  void (*state)(const LiteMlaArgs&, const TileGrid&, int64_t b, int64_t g, int64_t tile0, int64_t tile1, void* sum,
                void* scratch);
  // The group's finished state, in place; and its columns of the folded projection.
  void (*finish)(const LiteMlaArgs&, int64_t b, int64_t g, void* scratch);
  // The group's rows of the projection's input for one tile: att, or q' / den under the fold, into packed columns.
  void (*query)(const LiteMlaArgs&, const TileGrid&, int64_t b, int64_t g, int64_t tile, void* packed_cols,
                void* scratch);
  // Row panels [p0, p1) of y for one tile; rows: panel p0 of W, or of the image's W KV.
  void (*project)(const LiteMlaArgs&, const TileGrid&, int64_t b, int64_t tile, int64_t p0, int64_t p1,
                  const WeightRows& rows, const void* packed_cols, void* scratch);
  Bytes scratch_bytes;  // for state, finish and query
  int64_t (*project_bytes)(const LiteMlaArgs&, const TileGrid&, int64_t row_panels);
  int64_t (*packed_cols_numel)(int64_t n, int64_t depth);
  int64_t (*packed_rows_numel)(int64_t m, int64_t depth);
  int64_t panel_rows;
};

EVK_DECLARE_KERNELS(LiteMlaKernels, lite_mla_kernels)

}  // namespace efficientvit_kernels::cpu
