// The functions of csrc/cuda/ptx.cuh on the CPU, written from the PTX ISA. Included by ptx.cuh, which describes them.
//
// Copies: at the call the destination becomes NaN, as nothing may be read there until the copy is done; the bytes are
// moved as late as they may be, at the wait. ldmatrix: each lane reads the row that it names when it arrives, as early
// as it may. mma: products are exact, their sum is rounded once; hardware rounds more often, and not always to nearest.
#pragma once

#include "cuda_emulator.h"

namespace efficientvit_kernels::cuda {

using emulator::Site;

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return (bits | 0x00400000u) & 0xffffe000u;
  // Half of the last kept bit, added to the magnitude, rounds to nearest with ties away; infinities are not changed.
  return (bits + 0x1000u) & 0xffffe000u;
}

struct MmaOperand {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};
void complete_mma_tf32(void* const (&operands)[32], uint32_t present);
void complete_mma_f16(void* const (&operands)[32], uint32_t present);
void complete_mma_bf16(void* const (&operands)[32], uint32_t present);

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  static constexpr emulator::Collective kMma{"mma_m16n8k8_tf32", complete_mma_tf32, false, true, false};
  MmaOperand operand{d, a, b};
  emulator::meet(kMma, 0xffffffffu, &operand, site);
}

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
  static constexpr emulator::Collective kMma{"mma_m16n8k16_f16", complete_mma_f16, false, true, false};
  MmaOperand operand{d, a, b};
  emulator::meet(kMma, 0xffffffffu, &operand, site);
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Site site = Site::current()) {
  static constexpr emulator::Collective kMma{"mma_m16n8k16_bf16", complete_mma_bf16, false, true, false};
  MmaOperand operand{d, a, b};
  emulator::meet(kMma, 0xffffffffu, &operand, site);
}

struct LdmatrixOperand {
  uint16_t row[8];
  uint32_t* r;
  int count;
  bool trans;
};
void complete_ldmatrix(void* const (&operands)[32], uint32_t present);

// Another name for each form, so that lanes in different ones do not meet.
inline void ldmatrix(const char* name, uint32_t* r, int count, bool trans, const void* shared, Site site) {
  const emulator::Collective collective{name, complete_ldmatrix, false, true, false};
  LdmatrixOperand operand{{}, r, count, trans};
  if (emulator::lane() < 8 * count) {
    emulator::check_shared(shared, 16, 16, name, site);
    for (int i = 0; i < 8; ++i) operand.row[i] = static_cast<const uint16_t*>(shared)[i];
  }
  emulator::meet(collective, 0xffffffffu, &operand, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, Site site = Site::current()) {
  ldmatrix("ldmatrix_x4", r, 4, false, shared, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared, Site site = Site::current()) {
  ldmatrix("ldmatrix_x4_trans", r, 4, true, shared, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared, Site site = Site::current()) {
  ldmatrix("ldmatrix_x2", r, 2, false, shared, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared, Site site = Site::current()) {
  ldmatrix("ldmatrix_x2_trans", r, 2, true, shared, site);
}

inline void store_16(void* p, uint32_t a, uint32_t b, uint32_t c, uint32_t d, Site site = Site::current()) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("store_16", "misaligned address", site);
  auto* words = static_cast<uint32_t*>(p);
  words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}
inline void store_8(void* p, uint32_t a, uint32_t b, Site site = Site::current()) {
  if (reinterpret_cast<uintptr_t>(p) % 8) emulator::fail("store_8", "misaligned address", site);
  auto* words = static_cast<uint32_t*>(p);
  words[0] = a, words[1] = b;
}

inline void cp_async(const char* name, void* shared, const void* global, int size, bool valid, Site site) {
  emulator::check_shared(shared, size, size, name, site);
  if (reinterpret_cast<uintptr_t>(global) % size) emulator::fail(name, "misaligned global address", site);
  auto* to = static_cast<unsigned char*>(shared);
  for (int i = 0; i < size; ++i) to[i] = 0xff;
  emulator::push_copy({to, static_cast<const unsigned char*>(global), valid ? size : 0, size, 0});
}

inline void cp_async_16(void* shared, const void* global, bool valid, Site site = Site::current()) {
  cp_async("cp_async_16", shared, global, 16, valid, site);
}
inline void cp_async_8(void* shared, const void* global, bool valid, Site site = Site::current()) {
  cp_async("cp_async_8", shared, global, 8, valid, site);
}
inline void cp_async_4(void* shared, const void* global, bool valid, Site site = Site::current()) {
  cp_async("cp_async_4", shared, global, 4, valid, site);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int N>
void cp_async_wait() {
  static_assert(N >= 0);
  emulator::Copy copy;
  while (emulator::pop_copy(N, copy)) {
    for (int i = 0; i < copy.bytes; ++i) copy.shared[i] = copy.global[i];
    for (int i = copy.bytes; i < copy.size; ++i) copy.shared[i] = 0;
  }
}

inline uint32_t relu_f16x2(uint32_t x) {
  auto half = [](uint32_t h) { return (h & 0x7fffu) > 0x7c00u ? 0x7fffu : h & 0x8000u ? 0u : h; };
  return half(x & 0xffffu) | half(x >> 16) << 16;
}

inline uint32_t relu_bf16x2(uint32_t x) {
  auto half = [](uint32_t h) { return (h & 0x7fffu) > 0x7f80u ? 0x7fffu : h & 0x8000u ? 0u : h; };
  return half(x & 0xffffu) | half(x >> 16) << 16;
}

}  // namespace efficientvit_kernels::cuda
