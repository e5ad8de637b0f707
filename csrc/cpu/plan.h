// How the CPU kernels cut a problem into tasks. Pure functions of the problem: the thread count never enters, so
// results have the same bits at any thread count.
#pragma once

#include <cstdint>

namespace efficientvit_kernels::cpu {

// Tokens that one tile holds: [D, 64] fp32 is 4 KB at D = 16, so the three tiles of a pass stay in a 32 KB L1 to D
// = 32.
inline constexpr int64_t kTileTokens = 64;

inline constexpr int64_t at_least(int64_t least, int64_t x) { return x < least ? least : x; }

// Tokens that one task sums alone. A partial state costs (D + 1) * D floats, so wide heads take longer chunks.
inline constexpr int64_t chunk_tokens(int64_t head_dim) {
  return at_least(1024, (32 * head_dim + kTileTokens - 1) / kTileTokens * kTileTokens);
}

inline constexpr int64_t num_chunks(int64_t tokens, int64_t head_dim) {
  // A remainder of less than half a chunk joins its neighbour rather than becoming a task of its own.
  const int64_t chunk = chunk_tokens(head_dim);
  return at_least(1, (tokens + chunk / 2 - 1) / chunk);
}

// Tasks that one thread should take at least, so that a thread is woken only for work of about 10 microseconds.
inline constexpr int64_t grain_size(int64_t flops_per_task) {
  constexpr int64_t kFlopsWorthAThread = 1 << 19;
  return at_least(1, kFlopsWorthAThread / at_least(1, flops_per_task));
}

}  // namespace efficientvit_kernels::cpu
