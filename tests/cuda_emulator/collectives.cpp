// What the lanes of a warp do together: shuffles, votes, products of matrices. Never compiled with a sanitizer: one
// lane works on the operands of all.
#include <bit>

#include "cuda_emulator.h"
#include "ptx_twins.h"

namespace emulator {
namespace {

struct ShuffleOperand {
  uint64_t value;
  int source;
  uint64_t result;
};

void complete_shuffle(void* const (&operands)[32], uint32_t present) {
  for (uint32_t lanes = present; lanes; lanes &= lanes - 1) {
    auto& own = *static_cast<ShuffleOperand*>(operands[std::countr_zero(lanes)]);
    // The value of a lane that does not take part is undefined, so NaN.
    const bool there = present >> own.source & 1;
    own.result = there ? static_cast<ShuffleOperand*>(operands[own.source])->value : ~uint64_t{0};
  }
}

struct VoteOperand {
  bool predicate;
  uint32_t result;
};

void complete_ballot(void* const (&operands)[32], uint32_t present) {
  uint32_t votes = 0;
  for (uint32_t lanes = present; lanes; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    if (static_cast<VoteOperand*>(operands[lane])->predicate) votes |= 1u << lane;
  }
  for (uint32_t lanes = present; lanes; lanes &= lanes - 1)
    static_cast<VoteOperand*>(operands[std::countr_zero(lanes)])->result = votes;
}

void check_width(const char* name, int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail(name, "the width must be a power of two up to 32", site);
}

}  // namespace

void sync_warp(uint32_t mask, Site site) {
  static constexpr Collective kSyncWarp{"__syncwarp", nullptr, true, false, true};
  meet(kSyncWarp, mask, nullptr, site);
}

uint64_t shuffle(const char* name, uint32_t mask, uint64_t value, int source, Site site) {
  const Collective collective{name, complete_shuffle, false, false, false};
  ShuffleOperand operand{value, source, 0};
  meet(collective, mask, &operand, site);
  return operand.result;
}

int shuffle_source_index(int lane, int source, int width, Site site) {
  check_width("__shfl_sync", width, site);
  return (lane & ~(width - 1)) | (source & (width - 1));
}

// Lanes with a source outside their part of the warp keep their own value; up to a part of lower lanes may be read.
int shuffle_source_xor(int lane, int distance, int width, Site site) {
  check_width("__shfl_xor_sync", width, site);
  const int source = lane ^ distance;
  return source <= (lane | (width - 1)) && source >= 0 ? source : lane;
}

int shuffle_source_down(int lane, unsigned distance, int width, Site site) {
  check_width("__shfl_down_sync", width, site);
  return (lane & (width - 1)) + static_cast<int64_t>(distance) < width ? lane + static_cast<int>(distance) : lane;
}

int shuffle_source_up(int lane, unsigned distance, int width, Site site) {
  check_width("__shfl_up_sync", width, site);
  return (lane & (width - 1)) >= static_cast<int64_t>(distance) ? lane - static_cast<int>(distance) : lane;
}

uint32_t ballot(const char* name, uint32_t mask, bool predicate, Site site) {
  const Collective collective{name, complete_ballot, false, false, false};
  VoteOperand operand{predicate, 0};
  meet(collective, mask, &operand, site);
  return operand.result;
}

}  // namespace emulator

namespace efficientvit_kernels::cuda {
namespace {

// Half `high` of a word.
double float16_at(uint32_t word, int high) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(high ? word >> 16 : word);
  return __half2float(__half(raw));
}
double bfloat16_at(uint32_t word, int high) { return std::bit_cast<float>(high ? word & 0xffff0000u : word << 16); }

// A [16, K] times B [K, 8], gathered from the fragments of all lanes, and added to D.
template <int K>
struct Product {
  double a[16][K], b[K][8];

  void add_to(void* const (&operands)[32]) const {
    double d[16][8];
    for_each_element(operands, [&](float& own, int row, int column) { d[row][column] = own; });
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < K; ++k)
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for_each_element(operands, [&](float& own, int row, int column) { own = static_cast<float>(d[row][column]); });
  }

  template <class F>
  static void for_each_element(void* const (&operands)[32], F f) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        f(static_cast<MmaOperand*>(operands[lane])->d[i], lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
  }
};

template <double (*value)(uint32_t word, int high)>
void complete_16_bits(void* const (&operands)[32]) {
  Product<16> product;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<MmaOperand*>(operands[lane]);
    for (int high = 0; high < 2; ++high) {
      const int k = 2 * (lane % 4) + high;
      for (int i = 0; i < 4; ++i) product.a[lane / 4 + 8 * (i % 2)][k + 8 * (i / 2)] = value(operand.a[i], high);
      for (int i = 0; i < 2; ++i) product.b[k + 8 * i][lane / 4] = value(operand.b[i], high);
    }
  }
  product.add_to(operands);
}

}  // namespace

void complete_mma_tf32(void* const (&operands)[32], uint32_t) {
  auto value = [](uint32_t bits) { return static_cast<double>(std::bit_cast<float>(bits & 0xffffe000u)); };
  Product<8> product;
  for (int lane = 0; lane < 32; ++lane) {
    const auto& operand = *static_cast<MmaOperand*>(operands[lane]);
    for (int i = 0; i < 4; ++i) product.a[lane / 4 + 8 * (i % 2)][lane % 4 + 4 * (i / 2)] = value(operand.a[i]);
    for (int i = 0; i < 2; ++i) product.b[lane % 4 + 4 * i][lane / 4] = value(operand.b[i]);
  }
  product.add_to(operands);
}

void complete_mma_f16(void* const (&operands)[32], uint32_t) { complete_16_bits<float16_at>(operands); }
void complete_mma_bf16(void* const (&operands)[32], uint32_t) { complete_16_bits<bfloat16_at>(operands); }

void complete_ldmatrix(void* const (&operands)[32], uint32_t) {
  auto element = [&](int matrix, int row, int column) -> uint32_t {
    return static_cast<LdmatrixOperand*>(operands[8 * matrix + row])->row[column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<LdmatrixOperand*>(operands[lane]);
    const int row = lane / 4, column = 2 * (lane % 4);
    for (int i = 0; i < own.count; ++i)
      own.r[i] = own.trans ? element(i, column, row) | element(i, column + 1, row) << 16
                           : element(i, row, column) | element(i, row, column + 1) << 16;
  }
}

}  // namespace efficientvit_kernels::cuda
