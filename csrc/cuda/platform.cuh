// One header for the two worlds in which device code compiles: nvcc, and a C++ compiler on the CPU, where
// tests/cuda_emulator runs every CUDA thread as a fiber. Device code includes no CUDA header of its own.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// `unsigned char* name`: the block's dynamic shared memory, aligned to 128 bytes. There is no static shared memory: its
// size would not be checked against the launch, and the emulator would not see its end.
#define EVK_DYNAMIC_SHARED(name)                                                \
  extern __shared__ __align__(128) unsigned char evk_dynamic_shared_of_block[]; \
  unsigned char* name = evk_dynamic_shared_of_block

#else

#include "cuda_emulator.h"

#define EVK_DYNAMIC_SHARED(name) unsigned char* name = ::emulator::dynamic_shared()

#endif
