// Entry points by which Python runs the kernels of a sample: in the emulator, or with nvcc on a GPU.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

#include "platform.cuh"

// Every kernel of a sample has this signature, so that one entry point serves all.
using SampleKernel = void (*)(const float* in, float* out, int a, int b);

struct SampleCall {
  SampleKernel kernel;
  dim3 grid, block;
  size_t shared_bytes;
  const float* in;
  float* out;
  size_t in_count, out_count;
  int a, b;
};

#if defined(__CUDACC__)

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// Copies both tensors to the device and `out` back.
inline void launch_sample(const SampleCall& call) {
  float *in = nullptr, *out = nullptr;
  check(cudaMalloc(&in, call.in_count * sizeof(float)));
  check(cudaMalloc(&out, call.out_count * sizeof(float)));
  check(cudaMemcpy(in, call.in, call.in_count * sizeof(float), cudaMemcpyHostToDevice));
  check(cudaMemcpy(out, call.out, call.out_count * sizeof(float), cudaMemcpyHostToDevice));
  call.kernel<<<call.grid, call.block, call.shared_bytes>>>(in, out, call.a, call.b);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
  check(cudaMemcpy(call.out, out, call.out_count * sizeof(float), cudaMemcpyDeviceToHost));
  check(cudaFree(in));
  check(cudaFree(out));
}

#else

inline void launch_sample(const SampleCall& call) {
  emulator::launch(call.kernel, call.grid, call.block, call.shared_bytes, call.in, call.out, call.a, call.b);
}

#endif

// Null, or the words of the error. dims: grid x, y, z, block x, y, z.
inline const char* run_sample(SampleKernel kernel, const unsigned* dims, size_t shared_bytes, const float* in,
                              size_t in_count, float* out, size_t out_count, int a, int b) {
  static std::string words;
  try {
    launch_sample({kernel, dim3(dims[0], dims[1], dims[2]), dim3(dims[3], dims[4], dims[5]), shared_bytes, in, out,
                   in_count, out_count, a, b});
    return nullptr;
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
}

#define EVK_SAMPLE(kernel)                                                                                       \
  extern "C" __attribute__((visibility("default"))) const char* run_##kernel(                                    \
      const unsigned* dims, size_t shared_bytes, const float* in, size_t in_count, float* out, size_t out_count, \
      int a, int b) {                                                                                            \
    return run_sample(kernel, dims, shared_bytes, in, in_count, out, out_count, a, b);                           \
  }
