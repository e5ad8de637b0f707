// Entry points by which Python runs the kernels of a sample in the emulator. With nvcc a sample is device code only.
#pragma once

#include "platform.cuh"

#if defined(__CUDACC__)
#define EVK_SAMPLE(kernel)
#else

#include <exception>
#include <string>

// Every kernel of a sample has this signature, so that one entry point serves all.
using SampleKernel = void (*)(const float* in, float* out, int a, int b);

// Null, or the words of the error. dims: grid x, y, z, block x, y, z.
inline const char* run_sample(SampleKernel kernel, const unsigned* dims, size_t shared_bytes, const float* in,
                              float* out, int a, int b) {
  static std::string words;
  try {
    const dim3 grid(dims[0], dims[1], dims[2]), block(dims[3], dims[4], dims[5]);
    emulator::launch(kernel, grid, block, shared_bytes, in, out, a, b);
    return nullptr;
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
}

#define EVK_SAMPLE(kernel)                                                                    \
  extern "C" __attribute__((visibility("default"))) const char* run_##kernel(                 \
      const unsigned* dims, size_t shared_bytes, const float* in, float* out, int a, int b) { \
    return run_sample(kernel, dims, shared_bytes, in, out, a, b);                             \
  }

#endif
