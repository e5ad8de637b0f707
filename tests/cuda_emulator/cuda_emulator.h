// CUDA's language on the CPU: device code and launchers compile with a C++ compiler, and run.
//
// Every CUDA thread is a fiber on the thread that launches. The blocks of a launch run one after another, each of its
// threads until it must wait, so a kernel that lacks a barrier computes something wrong rather than sometimes. Shared
// memory starts as NaN. What is wrong otherwise is a std::runtime_error "cuda emulator: ...", thrown by the launch.
//
// Environment, read at every launch:
//   EVK_EMULATOR_ORDER  forward (default), reverse or random: the order of the threads, and of the blocks
//   EVK_EMULATOR_SEED   of the random order
//   EVK_EMULATOR_ARCH   compute capability, 80, 86, 89, 90, 100, 103 or 120: the limits of device(); default 90
//
// Threads that have returned are not waited for, at barriers as in warp-wide calls other than mma and ldmatrix; what is
// read from their lanes is NaN. A stack has 64 KB: a thread that writes to the last one is an error, beyond it SIGSEGV.
//
// Not seen: weak memory, banks and speed, the hardware's rounding inside an mma, threads beyond __launch_bounds__, more
// than 48 KB of shared memory without the attribute that CUDA wants for it; an endless loop is endless. Seen only with
// -fsanitize=undefined: misaligned vectors; address: accesses beyond global memory; thread: races between blocks, but
// for threads of the same index, and races that no order of the threads shows.
//
// Cost, in processor time of an Intel Xeon with AVX-512: 1000 blocks of 128 threads with 4 barriers 21 ms, without any
// 7 ms; 40 to 50 million switches a second, 0.4 to 0.7 million mma.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

using Site = std::source_location;

struct Device {
  int major = 9, minor = 0, multiprocessors = 132, max_shared_per_block = 227 * 1024;
};

// The device that launches are checked against. A new value of EVK_EMULATOR_ARCH replaces it.
Device& device();

// Kernel launches so far, those of empty and of refused grids excluded.
int64_t launches();

// The block's dynamic shared memory.
unsigned char* dynamic_shared();

// Throws "cuda emulator: <name>: <what> at <site>, block (..), thread (..)".
[[noreturn]] void fail(const char* name, const char* what, Site site);

// Throws unless these bytes lie in the block's dynamic shared memory and `p` is a multiple of `alignment`.
void check_shared(const void* p, size_t bytes, size_t alignment, const char* name, Site site);

// Runs `body(context)` once per thread.
void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* context);

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "one argument per parameter of the kernel");
  auto body = [&] { kernel(static_cast<Params>(args)...); };
  run(grid, block, shared_bytes, [](const void* self) { (*static_cast<const decltype(body)*>(self))(); }, &body);
}

// --- what the intrinsics of cuda_intrinsics.h and ptx_twins.h are made of --------------------------------------------

// Waits for the other threads of the block; exited threads are not waited for.
void block_barrier(Site site);

// A call that the lanes of `mask` make together. The lane that comes last runs `complete` once, for all: operands[i] is
// that of lane i, where bit i of `present` is set.
struct Collective {
  const char* name;
  void (*complete)(void* const (&operands)[32], uint32_t present);
  bool anywhere;  // the lanes may call it from different places
  bool aligned;   // all 32 lanes must take part
  bool orders_memory;
};
void meet(const Collective& collective, uint32_t mask, void* operand, Site site);

void sync_warp(uint32_t mask, Site site);

// The 8 bytes that lane `source` brings; all bits set where that lane does not take part.
uint64_t shuffle(const char* name, uint32_t mask, uint64_t value, int source, Site site);
int shuffle_source_index(int lane, int source, int width, Site site);
int shuffle_source_xor(int lane, int distance, int width, Site site);
int shuffle_source_down(int lane, unsigned distance, int width, Site site);
int shuffle_source_up(int lane, unsigned distance, int width, Site site);

uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site);
int lane();
uint32_t active_lanes();

void memory_fence();

// This thread's copies under way.
struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  int bytes;  // 0 of `size` where the copy was masked
  int size;
  int group;
};
void push_copy(const Copy& copy);
void commit_copies();
// The next copy of a finished group: all but the `pending` newest groups are finished. False when there is none.
bool pop_copy(int pending, Copy& copy);

}  // namespace emulator

#include "cuda_intrinsics.h"
