// CUDA's built-in functions, as far as the kernels use them. Included by cuda_emulator.h.
//
// Each that waits takes its place in the source as a last argument, which callers leave out: threads that meet in
// different calls are an error.
#pragma once

#include <bit>
#include <cmath>

inline void __syncthreads(emulator::Site site = emulator::Site::current()) { emulator::block_barrier(site); }

inline void __syncwarp(uint32_t mask = 0xffffffffu, emulator::Site site = emulator::Site::current()) {
  emulator::sync_warp(mask, site);
}

inline void __threadfence() { emulator::memory_fence(); }
inline void __threadfence_block() { emulator::memory_fence(); }

// --- shuffles and votes ---------------------------------------------------------------------------------------------

namespace emulator {

template <class T>
T shuffled(const char* name, uint32_t mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move 2, 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(name, mask, bits, source, site);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, emulator::Site site = emulator::Site::current()) {
  const int from = emulator::shuffle_source_index(emulator::lane(), source, width, site);
  return emulator::shuffled("__shfl_sync", mask, value, from, site);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int distance, int width = 32,
                  emulator::Site site = emulator::Site::current()) {
  const int from = emulator::shuffle_source_xor(emulator::lane(), distance, width, site);
  return emulator::shuffled("__shfl_xor_sync", mask, value, from, site);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned distance, int width = 32,
                   emulator::Site site = emulator::Site::current()) {
  const int from = emulator::shuffle_source_down(emulator::lane(), distance, width, site);
  return emulator::shuffled("__shfl_down_sync", mask, value, from, site);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32,
                 emulator::Site site = emulator::Site::current()) {
  const int from = emulator::shuffle_source_up(emulator::lane(), distance, width, site);
  return emulator::shuffled("__shfl_up_sync", mask, value, from, site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::ballot("__ballot_sync", mask, predicate != 0, site);
}

inline int __any_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::ballot("__any_sync", mask, predicate != 0, site) != 0;
}

// Exited lanes do not count, so the vote is for any that is against.
inline int __all_sync(uint32_t mask, int predicate, emulator::Site site = emulator::Site::current()) {
  return emulator::ballot("__all_sync", mask, predicate == 0, site) == 0;
}

// --- memory ---------------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* p) {
  return *p;
}

namespace emulator {

template <class T>
T atomic_add(T* p, T value) {
  T old, sum;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    sum = old + value;
  } while (!__atomic_compare_exchange(p, &old, &sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace emulator

inline float atomicAdd(float* p, float value) { return emulator::atomic_add(p, value); }
inline double atomicAdd(double* p, double value) { return emulator::atomic_add(p, value); }
inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return __atomic_fetch_add(p, value, __ATOMIC_RELAXED); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}

// --- arithmetic -----------------------------------------------------------------------------------------------------

// As CUDA's: mixed signs compare as unsigned, and of a NaN and a number the number is taken.
#define EVK_EMULATOR_MIN_MAX(R, A, B)                                                                              \
  inline R min(A a, B b) { return static_cast<R>(a) < static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); } \
  inline R max(A a, B b) { return static_cast<R>(a) > static_cast<R>(b) ? static_cast<R>(a) : static_cast<R>(b); }
EVK_EMULATOR_MIN_MAX(int, int, int)
EVK_EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EVK_EMULATOR_MIN_MAX(unsigned, int, unsigned)
EVK_EMULATOR_MIN_MAX(unsigned, unsigned, int)
EVK_EMULATOR_MIN_MAX(long, long, long)
EVK_EMULATOR_MIN_MAX(unsigned long, unsigned long, unsigned long)
EVK_EMULATOR_MIN_MAX(unsigned long, long, unsigned long)
EVK_EMULATOR_MIN_MAX(unsigned long, unsigned long, long)
EVK_EMULATOR_MIN_MAX(long long, long long, long long)
EVK_EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EVK_EMULATOR_MIN_MAX(unsigned long long, long long, unsigned long long)
EVK_EMULATOR_MIN_MAX(unsigned long long, unsigned long long, long long)
#undef EVK_EMULATOR_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(float a, double b) { return std::fmin(static_cast<double>(a), b); }
inline double max(float a, double b) { return std::fmax(static_cast<double>(a), b); }
inline double min(double a, float b) { return std::fmin(a, static_cast<double>(b)); }
inline double max(double a, float b) { return std::fmax(a, static_cast<double>(b)); }

using std::isfinite;
using std::isinf;
using std::isnan;
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// Correctly rounded here, less exact on a GPU, and 0 there for divisors above 2^126.
inline float __fdividef(float a, float b) { return std::abs(b) > 0x1p126f && !std::isinf(b) ? 0.0f * a : a / b; }
