// Which instruction set the CPU kernels use in this process.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace efficientvit_kernels::cpu {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

// The widest set that both this CPU and the operating system support.
inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// EFFICIENTVIT_KERNELS_CPU_ISA=baseline|avx2|avx512 lowers the choice (it never raises it: an instruction that the CPU
// lacks would kill the process). Read once per process.
inline Isa isa_in_use() {
  static const Isa isa = [] {
    const Isa detected = detect_isa();
    const char* wanted = std::getenv("EFFICIENTVIT_KERNELS_CPU_ISA");
    if (wanted == nullptr) return detected;
    for (Isa candidate : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
      if (std::strcmp(wanted, isa_name(candidate)) == 0 && candidate <= detected) return candidate;
    }
    return detected;
  }();
  return isa;
}

}  // namespace efficientvit_kernels::cpu

// Declares `function`, which every instruction set defines in its namespace, and `function_in_use`, which calls the one
// that this process uses.
#if defined(__x86_64__)
#define EVK_DECLARE_KERNELS(Table, function)                                             \
  namespace baseline {                                                                   \
  Table function(StorageType);                                                           \
  }                                                                                      \
  namespace avx2 {                                                                       \
  Table function(StorageType);                                                           \
  }                                                                                      \
  namespace avx512 {                                                                     \
  Table function(StorageType);                                                           \
  }                                                                                      \
  inline Table function##_in_use(StorageType type) {                                     \
    if (isa_in_use() == Isa::kAvx512) return avx512::function(type);                     \
    return isa_in_use() == Isa::kAvx2 ? avx2::function(type) : baseline::function(type); \
  }
#else
#define EVK_DECLARE_KERNELS(Table, function) \
  namespace baseline {                       \
  Table function(StorageType);               \
  }                                          \
  inline Table function##_in_use(StorageType type) { return baseline::function(type); }
#endif
