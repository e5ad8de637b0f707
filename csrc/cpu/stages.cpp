#include "stages.h"

#include <atomic>
#include <ctime>

namespace efficientvit_kernels::cpu {
namespace {
constexpr int kStages = static_cast<int>(Stage::kCount);
std::atomic<bool> wanted{false};
std::atomic<int64_t> nanoseconds_of[kStages];
}  // namespace

bool stages_wanted() { return wanted.load(std::memory_order_relaxed); }

void add_to_stage(Stage stage, int64_t nanoseconds) {
  nanoseconds_of[static_cast<int>(stage)].fetch_add(nanoseconds, std::memory_order_relaxed);
}

int64_t thread_nanoseconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return int64_t{1000000000} * now.tv_sec + now.tv_nsec;
}

}  // namespace efficientvit_kernels::cpu

// For `bench --stages`, through ctypes. Switching sets all stages to zero; the names are those of `Stage`, in order.
extern "C" __attribute__((visibility("default"))) void efficientvit_kernels_cpu_time_stages(bool on) {
  for (auto& stage : efficientvit_kernels::cpu::nanoseconds_of) stage.store(0);
  efficientvit_kernels::cpu::wanted.store(on);
}
extern "C" __attribute__((visibility("default"))) int64_t efficientvit_kernels_cpu_stage_ns(int stage) {
  return stage >= 0 && stage < efficientvit_kernels::cpu::kStages
             ? efficientvit_kernels::cpu::nanoseconds_of[stage].load()
             : -1;
}
extern "C" __attribute__((visibility("default"))) const char* efficientvit_kernels_cpu_stage_name(int stage) {
  static const char* const names[] = {"pack weights",
                                      "qkv product",
                                      "state",
                                      "finish state",
                                      "query",
                                      "projection",
                                      "aggregation",
                                      "attention forward",
                                      "attention backward",
                                      "aggregation backward",
                                      "input gradients",
                                      "weight gradients"};
  static_assert(sizeof(names) / sizeof(names[0]) == efficientvit_kernels::cpu::kStages);
  return stage >= 0 && stage < efficientvit_kernels::cpu::kStages ? names[stage] : nullptr;
}
