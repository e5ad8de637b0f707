// The four passes of ReLU linear attention for one instruction set.
//
// Every pass walks its tokens in tiles of kTileTokens: load to column form, one or two small products, one epilogue,
// store. Sums over tokens go tile by tile into a [D + 1, ld] matrix, whose row D belongs to the denominator.
#pragma once

#include "relu_linear_attention.h"
#include "tile.h"

namespace efficientvit_kernels::cpu::EVK_ISA {

enum Part { kQ = 0, kK = 1, kV = 2 };

// q, k or v of group g: groups are scale-major, and a head's channels are [q(D) | k(D) | v(D)].
template <class S>
static Tokens<S> part_of(const ImageTensor* scales, const ReluLinearAttentionArgs& args, int64_t b, int64_t g,
                         Part part) {
  const int64_t head = g % args.heads;
  return tokens_of<S>(scales[g / args.heads], args.height, args.width, b, (head * 3 + part) * args.head_dim);
}

template <class S>
static Tokens<S> out_of(const ReluLinearAttentionArgs& args, int64_t b, int64_t g) {
  return tokens_of<S>(args.out, args.height, args.width, b, g * args.head_dim);
}

// Scratch memory of one thread for head dim D: what the passes below call q_column, row, ... A task leaves
// old values behind, which the next one overwrites or keeps in padding.
template <class T>
struct Scratch {
  static constexpr int kColumns = 4, kRows = 2, kMatrices = 2;

  // Row stride of row tiles and matrices: whole vectors, and whole blocks of transpose_lanes_by_4.
  static int64_t row_stride(int64_t head_dim) { return (head_dim + 1 + 15) / 16 * 16; }
  static int64_t numel(int64_t ld) { return kColumns * ld * kTileLd + kRows * kTileTokens * ld + kMatrices * ld * ld; }

  Scratch(void* memory, int64_t head_dim) : ld(row_stride(head_dim)) {
    T* next = static_cast<T*>(memory);
    for (T*& tile : column) tile = next, next += ld * kTileLd;
    for (T*& tile : row) tile = next, next += kTileTokens * ld;
    for (T*& m : matrix) m = next, next += ld * ld;
  }

  int64_t ld;
  T *column[kColumns], *row[kRows], *matrix[kMatrices];
};

template <class T>
static void clear_matrix(T* m, int64_t head_dim, int64_t ld) {
  __builtin_memset(m, 0, (head_dim + 1) * ld * sizeof(T));
}

// [D + 1, D] matrices in memory are dense; in scratch their rows are `ld` apart.
template <class T>
static void load_matrix(const void* src, int64_t head_dim, T* dst, int64_t ld) {
  const T* dense = static_cast<const T*>(src);
  for (int64_t r = 0; r <= head_dim; ++r) __builtin_memcpy(dst + r * ld, dense + r * head_dim, head_dim * sizeof(T));
}

template <class T>
static void store_matrix(const T* src, int64_t ld, int64_t head_dim, void* dst) {
  T* dense = static_cast<T*>(dst);
  for (int64_t r = 0; r <= head_dim; ++r) __builtin_memcpy(dense + r * head_dim, src + r * ld, head_dim * sizeof(T));
}

template <class T>
static T* state_of(void* states, const ReluLinearAttentionArgs& args, const ReluLinearAttentionTask& task) {
  return static_cast<T*>(states) + (task.b * args.groups + task.g) * args.state_numel();
}

// x / den by way of 1 / den: one division a token instead of D, for an error of 1.5 ulp instead of 0.5. Only where
// every 1 / den is an ordinary number; otherwise (huge, subnormal or zero den, NaN) the true division keeps each
// special case.
template <class T>
inline constexpr T kReciprocalLimit = sizeof(T) == 4 ? T(0x1p96) : T(0x1p960);

// Divides the columns of `tile` by den, or returns the factors (written over den) that the caller multiplies them by.
template <class T>
static const T* divide_or_factors(T* tile, int64_t ld, int64_t rows, int64_t cols, T* den) {
  Vec<T> extraordinary{};  // a nonzero lane marks a den outside the range; padding columns are put inside it
  for (int64_t c = cols; c % kLanes<T> != 0; ++c) den[c] = T(1);
  for (int64_t c = 0; c < cols; c += kLanes<T>) {
    const Vec<T> d = load(den + c);
    extraordinary += d >= 1 / kReciprocalLimit<T> && d <= kReciprocalLimit<T> ? Vec<T>{} : broadcast(T(1));
  }
  T marks = 0;
  for (int i = 0; i < kLanes<T>; ++i) marks += extraordinary[i];
  const bool ordinary = marks == 0;
  for (int64_t c = 0; c < cols; c += kLanes<T>) {
    const Vec<T> d = load(den + c);
    if (ordinary) {
      store(den + c, broadcast(T(1)) / d);
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) store(tile + r * ld + c, load(tile + r * ld + c) / d);
  }
  return ordinary ? den : nullptr;
}

// --- forward
// ------------------------------------------------------------------------------------------------------------

template <class S>
static void state_kernel(const ReluLinearAttentionArgs& args, const ReluLinearAttentionTask& task, void* memory) {
  using T = Compute<S>;
  const int64_t D = args.head_dim;
  const Scratch<T> scratch(memory, D);
  const int64_t ld = scratch.ld;
  T *k_column = scratch.column[0], *v_column = scratch.column[1];
  T *k_row = scratch.row[0], *v_row = scratch.row[1], *sum = scratch.matrix[0];
  clear_matrix(sum, D, ld);
  const auto k = part_of<const S>(args.qkv, args, task.b, task.g, kK);
  const auto v = part_of<const S>(args.qkv, args, task.b, task.g, kV);
  const bool by_rows = k.stride_w != 1 && k.stride_c == 1;
  // A last row, or column, of ones in v sums k' beside v k'^T.
  for (int64_t i = 0; i < kTileTokens; ++i) v_column[D * kTileLd + i] = T(1);

  for (int64_t n = task.n0; n < task.n1; n += kTileTokens) {
    const int64_t count = task.n1 - n < kTileTokens ? task.n1 - n : kTileTokens;
    if (by_rows) {
      load_row_tile<Load::kRelu>(k, D, n, count, k_row, ld);
      load_row_tile<Load::kPlain>(v, D, n, count, v_row, ld);
      for (int64_t i = 0; i < count; ++i) v_row[i * ld + D] = T(1);
    } else {
      load_column_tile<Load::kRelu>(k, D, n, count, k_column, kTileLd, k_row, ld);
      transpose(k_column, kTileLd, D, count, k_row, ld);
      load_column_tile<Load::kPlain>(v, D, n, count, v_column, kTileLd, v_row, ld);
    }
    if (by_rows) {
      product<T, 1, true>(D + 1, count, D, v_row, ld, k_row, ld, sum, ld);
    } else {
      product<T, kTileLd, true>(D + 1, count, D, v_column, 1, k_row, ld, sum, ld);
    }
  }
  store_matrix(sum, ld, D, task.sum);
}

// O: what is stored, the storage type or the compute type.
template <class S, class O>
static void apply_kernel(const ReluLinearAttentionArgs& args, const ReluLinearAttentionTask& task, void* memory) {
  using T = Compute<S>;
  const int64_t D = args.head_dim;
  const Scratch<T> scratch(memory, D);
  const int64_t ld = scratch.ld;
  T *q_column = scratch.column[0], *out_column = scratch.column[1], *row = scratch.row[0];
  T *state = scratch.matrix[0], *state_t = scratch.matrix[1];
  load_matrix(state_of<T>(args.state, args, task), D, state, ld);
  transpose(state, ld, D + 1, D, state_t, ld);
  const auto q = part_of<const S>(args.qkv, args, task.b, task.g, kQ);
  const auto out = out_of<O>(args, task.b, task.g);
  T* den = out_column + D * kTileLd;

  for (int64_t n = task.n0; n < task.n1; n += kTileTokens) {
    const int64_t count = task.n1 - n < kTileTokens ? task.n1 - n : kTileTokens;
    load_column_tile<Load::kRelu>(q, D, n, count, q_column, kTileLd, row, ld);
    product<T, 1, false>(D + 1, D, count, state_t, ld, q_column, kTileLd, out_column, kTileLd);
    add_to_row(den, count, static_cast<T>(args.eps));
    const T* factors = divide_or_factors(out_column, kTileLd, D, count, den);
    store_column_tile(out_column, kTileLd, factors, out, D, n, count, row, ld);
  }
}

// --- backward
// -----------------------------------------------------------------------------------------------------------
//
// With KV and z the state, dO = grad_out, den_n = z . q'_n + eps, dnum_n = dO_n / den_n, u_n = KV^T dnum_n:
//   dden_n = -(q'_n . u_n) / den_n          (no forward output needed, and never 1 / den^2, which can overflow)
//   grad_q_n = (u_n + dden_n z) [q_n > 0],  grad_state = sum_n [dnum_n; dden_n] q'_n^T
//   grad_v_n = grad_KV k'_n,  grad_k_n = (grad_KV^T v_n + grad_z) [k_n > 0]
// A relu's gradient is 1 at NaN and 0 at 0, as in torch: the mask is !(x <= 0).

static inline bool wants_grad(const ReluLinearAttentionArgs& args, const ReluLinearAttentionTask& task) {
  return args.grad_qkv[task.g / args.heads].data != nullptr;
}

template <class T>
static void mask_by_relu(T* tile, const T* relued, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kLanes<T>) {
      const int64_t i = r * kTileLd + c;
      store(tile + i, load(relued + i) <= 0 ? Vec<T>{} : load(tile + i));
    }
  }
}

template <class T>
static void scale_columns(T* tile, int64_t rows, int64_t cols, const T* factors) {
  for (int64_t r = 0; r < rows; ++r) {
    T* row = tile + r * kTileLd;
    for (int64_t c = 0; c < cols; c += kLanes<T>) store(row + c, load(row + c) * load(factors + c));
  }
}

// grad_q is a difference: u - z (q' . u) / den, exactly zero where q' has one positive element. A token with a tiny den
// makes both terms huge, and its rounding errors would be the largest of the whole image. So den and q' . u are summed
// in double, and dden is kept as the sum of two T (grad_denominator): then an error in u cancels as u itself does.
template <class T>
static void denominator(const T* q, const T* z, int64_t rows, int64_t cols, double eps, double* wide_den, T* den) {
  for (int64_t c = 0; c < cols; c += kLanes<double>) {
    Vec<double> dot = broadcast(eps);
    for (int64_t r = 0; r < rows; ++r) dot += load_wide(q + r * kTileLd + c) * broadcast(static_cast<double>(z[r]));
    store(wide_den + c, dot);
    store_narrow(den + c, dot);
  }
}

// dden = -(q' . u) / den = high + low
template <class T>
static void grad_denominator(const T* q, const T* u, int64_t rows, int64_t cols, const double* wide_den, T* high,
                             T* low) {
  for (int64_t c = 0; c < cols; c += kLanes<double>) {
    Vec<double> dot{};
    for (int64_t r = 0; r < rows; ++r) dot -= load_wide(q + r * kTileLd + c) * load_wide(u + r * kTileLd + c);
    const Vec<double> dden = dot / load(wide_den + c);
    store_narrow(high + c, dden);
    const Vec<double> rounded = load_wide(high + c);
    store_narrow(low + c, rounded - rounded == 0 ? dden - rounded : Vec<double>{});  // inf - inf would be NaN
  }
}

// tile[r][c] += column[r] * (high[c] + low[c])
template <class T>
static void add_outer(T* tile, const T* column, const T* high, const T* low, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vec<T> x = broadcast(column[r]);
    for (int64_t c = 0; c < cols; c += kLanes<T>) {
      T* out = tile + r * kTileLd + c;
      const Vec<T> sum = load(out) + x * load(high + c);
      store(out, sum + x * load(low + c));
    }
  }
}

template <class S>
static void grad_q_kernel(const ReluLinearAttentionArgs& args, const ReluLinearAttentionTask& task, void* memory) {
  if (!wants_grad(args, task)) return;
  using T = Compute<S>;
  const int64_t D = args.head_dim;
  const Scratch<T> scratch(memory, D);
  const int64_t ld = scratch.ld;
  T *q_column = scratch.column[0], *dnum = scratch.column[1], *u = scratch.column[2], *den = scratch.column[3];
  T *row = scratch.row[0], *state = scratch.matrix[0], *sum = scratch.matrix[1];
  clear_matrix(sum, D, ld);
  load_matrix(state_of<T>(args.state, args, task), D, state, ld);
  const T* z = state + D * ld;
  T *dden = dnum + D * kTileLd, *dden_low = u + D * kTileLd;
  double wide_den[kTileLd];
  const auto q = part_of<const S>(args.qkv, args, task.b, task.g, kQ);
  const auto grad_out = out_of<const S>(args, task.b, task.g);
  const auto grad_q = part_of<S>(args.grad_qkv, args, task.b, task.g, kQ);

  for (int64_t n = task.n0; n < task.n1; n += kTileTokens) {
    const int64_t count = task.n1 - n < kTileTokens ? task.n1 - n : kTileTokens;
    load_column_tile<Load::kRelu>(q, D, n, count, q_column, kTileLd, row, ld);
    load_column_tile<Load::kPlain>(grad_out, D, n, count, dnum, kTileLd, row, ld);
    denominator(q_column, z, D, count, static_cast<T>(args.eps), wide_den, den);
    const T* factors = divide_or_factors(dnum, kTileLd, D, count, den);
    if (factors) scale_columns(dnum, D, count, factors);
    product<T, 1, false>(D, D, count, state, ld, dnum, kTileLd, u, kTileLd);
    grad_denominator(q_column, u, D, count, wide_den, dden, dden_low);
    transpose(q_column, kTileLd, D, count, row, ld);
    product<T, kTileLd, true>(D + 1, count, D, dnum, 1, row, ld, sum, ld);
    add_outer(u, z, dden, dden_low, D, count);
    mask_by_relu(u, q_column, D, count);
    store_column_tile<S, T>(u, kTileLd, nullptr, grad_q, D, n, count, row, ld);
  }
  store_matrix(sum, ld, D, task.sum);
}

template <class S>
static void grad_kv_kernel(const ReluLinearAttentionArgs& args, const ReluLinearAttentionTask& task, void* memory) {
  if (!wants_grad(args, task)) return;
  using T = Compute<S>;
  const int64_t D = args.head_dim;
  const Scratch<T> scratch(memory, D);
  const int64_t ld = scratch.ld;
  T *k_column = scratch.column[0], *v_column = scratch.column[1], *grad = scratch.column[2], *row = scratch.row[0];
  T *grad_state = scratch.matrix[0], *grad_state_t = scratch.matrix[1];
  load_matrix(state_of<T>(args.grad_state, args, task), D, grad_state, ld);
  transpose(grad_state, ld, D + 1, D, grad_state_t, ld);
  const auto k = part_of<const S>(args.qkv, args, task.b, task.g, kK);
  const auto v = part_of<const S>(args.qkv, args, task.b, task.g, kV);
  const auto grad_k = part_of<S>(args.grad_qkv, args, task.b, task.g, kK);
  const auto grad_v = part_of<S>(args.grad_qkv, args, task.b, task.g, kV);
  const T* grad_z = grad_state + D * ld;

  for (int64_t n = task.n0; n < task.n1; n += kTileTokens) {
    const int64_t count = task.n1 - n < kTileTokens ? task.n1 - n : kTileTokens;
    load_column_tile<Load::kRelu>(k, D, n, count, k_column, kTileLd, row, ld);
    load_column_tile<Load::kPlain>(v, D, n, count, v_column, kTileLd, row, ld);
    product<T, 1, false>(D, D, count, grad_state_t, ld, k_column, kTileLd, grad, kTileLd);
    store_column_tile<S, T>(grad, kTileLd, nullptr, grad_v, D, n, count, row, ld);
    product<T, 1, false>(D, D, count, grad_state, ld, v_column, kTileLd, grad, kTileLd);
    for (int64_t j = 0; j < D; ++j) add_to_row(grad + j * kTileLd, count, grad_z[j]);
    mask_by_relu(grad, k_column, D, count);
    store_column_tile<S, T>(grad, kTileLd, nullptr, grad_k, D, n, count, row, ld);
  }
}

// --- table
// --------------------------------------------------------------------------------------------------------------

template <class S>
static ReluLinearAttentionKernels kernels_for() {
  return {state_kernel<S>,
          apply_kernel<S, S>,
          apply_kernel<S, Compute<S>>,
          grad_q_kernel<S>,
          grad_kv_kernel<S>,
          [](int64_t head_dim) -> int64_t {
            using T = Compute<S>;
            return Scratch<T>::numel(Scratch<T>::row_stride(head_dim)) * static_cast<int64_t>(sizeof(T));
          }};
}

ReluLinearAttentionKernels relu_linear_attention_kernels(StorageType type) {
  switch (type) {
    case StorageType::kDouble:
      return kernels_for<double>();
    case StorageType::kHalf:
      return kernels_for<Half>();
    case StorageType::kBFloat16:
      return kernels_for<BFloat16>();
    default:
      return kernels_for<float>();
  }
}

}  // namespace efficientvit_kernels::cpu::EVK_ISA
