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

// Tokens that one tile of the aggregation holds at most: a few rows of a wide image, or all of a small one. Of wide
// images it takes four rows, if it can: the halo above and below is loaded for every tile.
inline constexpr int64_t kAggregateTokens = 512;

inline constexpr int64_t aggregate_tokens(int64_t width) {
  return 4 * width <= 256 ? 256 : 4 * width < kAggregateTokens ? 4 * width : kAggregateTokens;
}

// The backward recomputes a halo around each tile, so its tiles are larger; one task sums the weights' gradients over
// this many tokens.
inline constexpr int64_t kAggregateGradTokens = 512;
inline constexpr int64_t kAggregateGradTokensPerTask = 4096;

// Pixels [r0, r1) x [c0, c1) of an image.
struct Region {
  int64_t r0, r1, c0, c1;

  int64_t rows() const { return r1 - r0; }
  int64_t cols() const { return c1 - c0; }
  int64_t tokens() const { return rows() * cols(); }
};

// An image cut into regions of at most `max_tokens` and nearly equal sizes; rows are cut only where one is longer.
struct TileGrid {
  TileGrid(int64_t height, int64_t width, int64_t max_tokens) : height(height), width(width) {
    down_columns = at_least(1, (width + max_tokens - 1) / max_tokens);
    const int64_t cols = at_least(1, (width + down_columns - 1) / down_columns);
    const int64_t rows = at_least(1, max_tokens / cols);
    down_rows = (height + rows - 1) / rows;
  }

  int64_t tiles() const { return down_rows * down_columns; }
  Region region(int64_t i) const {
    const int64_t r = i / down_columns, c = i % down_columns;
    return {height * r / down_rows, height * (r + 1) / down_rows, width * c / down_columns,
            width * (c + 1) / down_columns};
  }

  int64_t height, width, down_rows, down_columns;
};

// Tasks that one thread should take at least, so that a thread is woken only for work of about 10 microseconds.
inline constexpr int64_t grain_size(int64_t flops_per_task) {
  constexpr int64_t kFlopsWorthAThread = 1 << 19;
  return at_least(1, kFlopsWorthAThread / at_least(1, flops_per_task));
}

}  // namespace efficientvit_kernels::cpu
