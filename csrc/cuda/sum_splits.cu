#include "sum_splits.h"
#include "sum_splits_kernels.cuh"

namespace efficientvit_kernels::cuda {

void sum_splits(const Launcher& launch, const float* states, float* sums, int64_t pairs, int64_t splits,
                int64_t numel) {
  launch(sum_splits_kernel, ceil_div(pairs * numel, kThreads), kThreads, 0, states, sums, splits,
         static_cast<int>(numel), pairs * numel);
}

}  // namespace efficientvit_kernels::cuda
