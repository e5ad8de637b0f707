// Multi-scale aggregation of qkv on the CPU: what the launcher hands to the kernels of one instruction set.
//
// Axes: B images, D head dim, T = heads * D. A "part" is q, k or v of one head: D channels, one group of the pointwise
// convolution. Per scale and part, with depthwise W, pointwise P, biases b and c:
//   u[i, n] = sum_tap W[i, tap] qkv[i, n + tap] + b[i],   out[o, n] = sum_i P[o, i] u[i, n] + c[o].
#pragma once

#include <cstdint>

#include "image.h"
#include "isa.h"
#include "plan.h"

namespace efficientvit_kernels::cpu {

struct AggregateScale {
  int64_t size;  // kernel size, odd
  // Dense, of the storage type; a bias is null where there is none.
  const void *depthwise, *pointwise, *depthwise_bias, *pointwise_bias;  // [3T, size * size], [3T, D], [3T], [3T]
  ImageTensor out;                                                      // [B, 3T, H, W]; the backward reads grad_out
  const void* prepared;  // the weights in the compute type, prepared_numel values for each part

  int64_t pad() const { return size / 2; }
  // Values that the gradients of one part's weights take: pointwise, depthwise, both biases.
  int64_t grad_numel(int64_t head_dim) const { return head_dim * (head_dim + size * size + 2); }
};

struct MultiscaleAggregateArgs {
  ImageTensor qkv;  // [B, 3T, H, W]
  const AggregateScale* scales;
  int64_t num_scales, parts, head_dim, height, width;

  // Backward only. grad_qkv: data is null where it is not wanted. With `accumulate`, grad_qkv holds a gradient already.
  ImageTensor grad_qkv;
  bool accumulate, needs_weights;

  int64_t max_pad() const {
    int64_t pad = 0;
    for (int64_t s = 0; s < num_scales; ++s) pad = scales[s].pad() > pad ? scales[s].pad() : pad;
    return pad;
  }
  int64_t grad_numel() const {
    int64_t numel = 0;
    for (int64_t s = 0; s < num_scales; ++s) numel += scales[s].grad_numel(head_dim);
    return numel;
  }
};

// One task: tiles [tile0, tile1) of the grid, part `part` of image b. The backward writes the weights' gradients over
// its tiles to `grads`: per scale [D, D] pointwise, [D, size * size] depthwise, [D] depthwise bias, [D] pointwise bias.
struct MultiscaleAggregateTask {
  int64_t b, part, tile0, tile1;
  void* grads;
};

struct MultiscaleAggregateKernels {
  // The last argument is scratch memory: as many bytes, on a 64-byte boundary, as the next two functions say.
  using Kernel = void (*)(const MultiscaleAggregateArgs&, const TileGrid&, const MultiscaleAggregateTask&, void*);
  using Bytes = int64_t (*)(const MultiscaleAggregateArgs&, const TileGrid&);
  Kernel forward, backward;
  Bytes forward_bytes, backward_bytes;
  // Writes one part's weights as the kernels read them.
  void (*prepare)(const AggregateScale&, int64_t head_dim, int64_t part, void* prepared);
  int64_t (*prepared_numel)(int64_t head_dim, int64_t size);
};

EVK_DECLARE_KERNELS(MultiscaleAggregateKernels, multiscale_aggregate_kernels)

}  // namespace efficientvit_kernels::cpu
