// The second step of a sum that was split over tokens, where there are too many splits for every reader to add up.
#pragma once

#include "runtime.h"

namespace efficientvit_kernels::cuda {

// sums [pairs, numel] = states [pairs, splits, numel], added up in their order.
void sum_splits(const Launcher& launch, const float* states, float* sums, int64_t pairs, int64_t splits, int64_t numel);

}  // namespace efficientvit_kernels::cuda
