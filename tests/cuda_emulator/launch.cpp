// Launches: the device's limits, the order of the blocks, shared memory.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <utility>

#include "scheduler.h"

namespace emulator {

using namespace internal;

namespace {

constexpr size_t kRedZone = 1024;

// What lies around shared memory is NaN in 16 and 32 bits; a signalling one, where arithmetic makes another of it, so
// that even adding to it leaves a trace.
std::array<unsigned char, kRedZone + 1> red_bytes() {
  std::array<unsigned char, kRedZone + 1> bytes;
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = i % 2 ? 0x7f : 0xa5;
  return bytes;
}
const std::array<unsigned char, kRedZone + 1> kRedBytes = red_bytes();
const unsigned char* red_bytes_at(const unsigned char* p) {
  return kRedBytes.data() + reinterpret_cast<uintptr_t>(p) % 2;
}

int64_t launch_count = 0;

// Shared memory between two red zones. ThreadSanitizer needs a new piece for each block, as it would take what the
// blocks before have left for races.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : bytes_(bytes) { add(); }
  ~SharedMemory() { unpoison(); }

  void begin_block() {
    if (__tsan_acquire && used_) add();
    used_ = true;
    unpoison();
    std::memset(zone() + kRedZone, 0xff, bytes_);
    state.shared = zone() + kRedZone;
    state.shared_bytes = bytes_;
    for (unsigned char* red : {zone(), zone() + kRedZone + bytes_}) {
      std::memcpy(red, red_bytes_at(red), kRedZone);
      if (__asan_poison_memory_region) __asan_poison_memory_region(red, kRedZone);
    }
  }

  void end_block() {
    unpoison();
    auto intact = [](const unsigned char* red) { return std::memcmp(red, red_bytes_at(red), kRedZone) == 0; };
    if (!intact(zone())) throw error_of("something was written before shared memory, " + block_text());
    if (!intact(zone() + kRedZone + bytes_))
      throw error_of("something was written after shared memory of " + std::to_string(bytes_) + " bytes, " +
                     block_text());
  }

 private:
  // Aligned to 128 bytes and not to more, so that nothing comes to rely on more.
  unsigned char* zone() const { return pieces_.back().get() + 128; }
  void unpoison() {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(zone(), 2 * kRedZone + bytes_);
  }
  void add() {
    const size_t size = (128 + 2 * kRedZone + bytes_ + 255) / 256 * 256;
    pieces_.emplace_back(static_cast<unsigned char*>(std::aligned_alloc(256, size)), &std::free);
    if (!pieces_.back()) throw std::bad_alloc();
  }

  size_t bytes_;
  bool used_ = false;
  std::vector<std::unique_ptr<unsigned char, decltype(&std::free)>> pieces_;
};

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

Order order_from_environment() {
  const std::string order = environment("EVK_EMULATOR_ORDER");
  if (order.empty() || order == "forward") return Order::kForward;
  if (order == "reverse") return Order::kReverse;
  if (order == "random") return Order::kRandom;
  throw error_of("EVK_EMULATOR_ORDER must be forward, reverse or random, got " + order);
}

Device device_of(const std::string& arch) {
  if (arch == "80") return {8, 0, 108, 163 * 1024};
  if (arch == "86") return {8, 6, 84, 99 * 1024};
  if (arch == "89") return {8, 9, 128, 99 * 1024};
  if (arch == "90") return {9, 0, 132, 227 * 1024};
  if (arch == "100") return {10, 0, 148, 227 * 1024};
  if (arch == "103") return {10, 3, 148, 227 * 1024};
  if (arch == "120") return {12, 0, 170, 99 * 1024};
  throw error_of("EVK_EMULATOR_ARCH must be 80, 86, 89, 90, 100, 103 or 120, got " + arch);
}

void check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const bool grid_fits = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
  const bool block_fits = threads && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && threads <= kMaxThreads;
  if (!grid_fits || !block_fits)
    throw error_of("launch failed: invalid configuration argument: grid " + text(grid.x, grid.y, grid.z) + ", block " +
                   text(block.x, block.y, block.z));
  const auto limit = static_cast<size_t>(device().max_shared_per_block);
  if (shared_bytes > limit)
    throw error_of("launch failed: invalid argument: " + std::to_string(shared_bytes) +
                   " bytes of shared memory, the device has " + std::to_string(limit) + " per block");
}

void prepare(int threads) {
  state.threads = threads;
  state.order = order_from_environment();
  const std::string seed = environment("EVK_EMULATOR_SEED");
  state.random = (seed.empty() ? 0 : std::stoull(seed)) * 2 + 0x9e3779b97f4a7c15u;
  if (__tsan_get_current_fiber) state.launching.tsan = __tsan_get_current_fiber();
  while (static_cast<int>(state.fibers.size()) < threads) {
    state.fibers.push_back(std::make_unique<Fiber>());
    state.fibers.back()->number = static_cast<int>(state.fibers.size()) - 1;
  }
}

void run_blocks(size_t shared_bytes) {
  SharedMemory memory(shared_bytes);
  const uint64_t count = static_cast<uint64_t>(gridDim.x) * gridDim.y * gridDim.z;
  std::vector<uint64_t> shuffled;
  if (state.order == Order::kRandom) {
    shuffled.resize(count);
    std::iota(shuffled.begin(), shuffled.end(), uint64_t{0});
    for (uint64_t i = count; i > 1; --i) std::swap(shuffled[i - 1], shuffled[next_random() % i]);
  }
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t block = shuffled.empty() ? (state.order == Order::kReverse ? count - 1 - i : i) : shuffled[i];
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    memory.begin_block();
    run_threads();
    memory.end_block();
  }
  acquire(&state.end_token);
}

}  // namespace

Device& device() {
  static Device chosen;
  static std::string last;
  const std::string arch = environment("EVK_EMULATOR_ARCH");
  if (arch != last) chosen = arch.empty() ? Device() : device_of(arch);
  last = arch;
  return chosen;
}

int64_t launches() { return launch_count; }

void run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* context) {
  static std::mutex one_at_a_time;
  const std::scoped_lock lock(one_at_a_time);
  check_limits(grid, block, shared_bytes);
  ++launch_count;
  gridDim = grid;
  blockDim = block;
  prepare(static_cast<int>(block.x * block.y * block.z));
  state.body = body;
  state.context = context;
  run_blocks(shared_bytes);
}

}  // namespace emulator
