// ReLU linear attention on the CPU: what the launcher hands to the kernels of one instruction set.
//
// Axes: B images, G groups (heads over all scales), D head dim, N tokens. Per group, with q' = relu(q), k' = relu(k):
//   state[d, j] = sum_n v[d, n] k'[j, n]  (d < D),   state[D, j] = sum_n k'[j, n];
//   out[d, n] = (sum_j state[d, j] q'[j, n]) / (sum_j state[D, j] q'[j, n] + eps).
#pragma once

#include <cstdint>

#include "image.h"
#include "isa.h"

namespace efficientvit_kernels::cpu {

struct ReluLinearAttentionArgs {
  const ImageTensor* qkv;       // [scales], each [B, heads * 3 * D, H, W]
  const ImageTensor* grad_qkv;  // [scales] for the backward; data is null where no gradient is wanted
  ImageTensor out;              // [B, G * D, H, W]; the backward reads grad_out through it
  void* state;                  // [B * G, D + 1, D], compute type
  void* partial;                // [chunks - 1, B * G, D + 1, D]: what a pass sums over chunks 1, 2, ...
  void* grad_state;             // [B * G, D + 1, D]: gradient of the state, backward only
  int64_t heads, groups, head_dim, height, width;
  double eps;

  int64_t tokens() const { return height * width; }
  int64_t state_numel() const { return (head_dim + 1) * head_dim; }
};

// One task of a pass: tokens [n0, n1) of group g of image b. Sums go to `sum`, a [D + 1, D] matrix of this task's own.
struct ReluLinearAttentionTask {
  int64_t b, g, n0, n1;
  void* sum;
};

struct ReluLinearAttentionKernels {
  // The last argument is scratch memory: scratch_bytes(D) bytes on a 64-byte boundary, one block per thread.
  using Kernel = void (*)(const ReluLinearAttentionArgs&, const ReluLinearAttentionTask&, void*);
  Kernel state;       // forward 1: sum = state over the task's tokens
  Kernel apply;       // forward 2: out
  Kernel apply_wide;  // the same, with out in the compute type
  Kernel grad_q;      // backward 1: grad_q, sum = grad_state over the task's tokens
  Kernel grad_kv;     // backward 2: grad_k and grad_v
  int64_t (*scratch_bytes)(int64_t head_dim);
};

EVK_DECLARE_KERNELS(ReluLinearAttentionKernels, relu_linear_attention_kernels)

}  // namespace efficientvit_kernels::cpu
