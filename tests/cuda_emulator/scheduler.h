// The emulator's own state: a block's threads, and whose turn it is. Shared by scheduler.cpp and launch.cpp.
//
// Neither is ever compiled with a sanitizer: their accesses would be reported, as the fibers share this state without
// telling ThreadSanitizer.
#pragma once

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_emulator.h"
#include "fibers.h"

namespace emulator::internal {

constexpr int kMaxThreads = 1024;
enum class Order { kForward, kReverse, kRandom };

struct Fiber : Context {
  uint3 index{};
  int number = 0;
  bool started = false;
  bool finished = true;
  const char* waits_in = nullptr;
  Site site;
  std::vector<Copy> copies;  // the first `copies_done` of them are finished
  size_t copies_done = 0;
  int open_group = 0;
};

// Lanes that wait for one another in the same collective; `mask` names them.
struct Group {
  const Collective* collective = nullptr;
  uint32_t mask = 0, arrived = 0;
  unsigned generation = 0;
  Site site;
  char tokens[2];  // for ThreadSanitizer: an address per generation
};

struct Warp {
  uint32_t alive = 0, runnable = 0;
  Group groups[32];  // by the lowest lane of their mask
  void* operands[32];
};

struct State {
  Context launching;
  Context* current = &launching;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Warp warps[kMaxThreads / 32];
  int threads = 0, alive = 0;
  uint32_t ready_warps = 0;
  Order order = Order::kForward;
  uint64_t random = 1;

  int at_barrier = 0;
  unsigned barrier_generation = 0;
  Site barrier_site;
  char barrier_tokens[2], begin_token, end_token, fence_token;

  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  std::exception_ptr error;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
};
extern State state;

// Words for errors: "(x, y, z)", "file:line", "block (x, y, z)".
std::string text(unsigned x, unsigned y, unsigned z);
std::string text(const Site& site);
std::string block_text();
std::runtime_error error_of(const std::string& words);

uint64_t next_random();

// Runs all threads of a block; throws what one of them throws, or the report of a deadlock.
void run_threads();

// For ThreadSanitizer: what happened before a release of a token is visible after an acquire of it.
inline void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}
inline void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}

}  // namespace emulator::internal
