// The table of the kernels for a storage type; see lite_mla.h.
#pragma once

#include "lite_mla.h"
#include "lite_mla_kernels.cuh"

namespace efficientvit_kernels::cuda {

template <class T>
LiteMlaKernels lite_mla_kernels(int64_t head_dim, int64_t size) {
  return for_kernel_size(size, [=](auto taps) -> LiteMlaKernels {
    constexpr int K = decltype(taps)::value;
    if (head_dim == 8) return {lite_mla_state_kernel<T, 8, K>, lite_mla_apply_kernel<T, 8, K>};
    if (head_dim == 16) return {lite_mla_state_kernel<T, 16, K>, lite_mla_apply_kernel<T, 16, K>};
    return {lite_mla_state_kernel<T, 32, K>, lite_mla_apply_kernel<T, 32, K>};
  });
}

}  // namespace efficientvit_kernels::cuda
