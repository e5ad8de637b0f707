// How the projection of lite_mla is laid out on a GPU; see launch_plan.h.
#pragma once

#include "launch_plan.h"

namespace efficientvit_kernels::cuda {

constexpr int kProjectionRows = 64;                    // channels of y per block
constexpr int kProjectionStep = 32;                    // channels of x per stage
constexpr int kProjectionStages = 3;                   // two are under way while one is multiplied
constexpr int kProjectionPitch = kProjectionStep + 8;  // rows of neighbouring tokens start in different banks

struct ProjectionPlan {
  int tokens;  // per block, 32 or 64
  int64_t row_blocks, blocks, shared_bytes;
};

// `tokens`: of all images. Fewer per block where there are not two blocks for every multiprocessor.
inline ProjectionPlan plan_projection(int64_t out_channels, int64_t tokens, const Device& device) {
  const int64_t row_blocks = ceil_div(out_channels, kProjectionRows);
  const int per_block = row_blocks * ceil_div(tokens, 64) >= 2 * device.multiprocessors ? 64 : 32;
  const int64_t stages = int64_t{kProjectionStages} * (kProjectionRows + per_block) * kProjectionPitch * 2;
  const int64_t sums = int64_t{kProjectionRows} * (per_block + 4) * 4;
  return {per_block, row_blocks, row_blocks * ceil_div(tokens, per_block), std::max(stages, sums)};
}

}  // namespace efficientvit_kernels::cuda
