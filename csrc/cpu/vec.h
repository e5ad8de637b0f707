// Vectors, storage conversions and the 128-bit-lane transpose for ONE instruction set.
//
// Included by kernels_<isa>.cpp, which defines EVK_ISA: everything lives in a namespace named after the instruction
// set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace efficientvit_kernels::cpu::EVK_ISA {

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
inline constexpr int kVecRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVecBytes = 32;
inline constexpr int kVecRegisters = 16;
#else
inline constexpr int kVecBytes = 16;
inline constexpr int kVecRegisters = 16;
#endif

template <class T>
struct VecType {
  typedef T type __attribute__((vector_size(kVecBytes)));
};
template <class T>
using Vec = typename VecType<T>::type;
template <class T>
inline constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(T));

template <class T>
static inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 keeps the sign of zero and is folded away; x + 0 would not
}

// As many values as a Vec<double> holds, in double.
static inline Vec<double> load_wide(const double* p) { return load(p); }
static inline Vec<double> load_wide(const float* p) {
  typedef float Floats __attribute__((vector_size(kVecBytes / 2)));
  Floats v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Vec<double>);
}
static inline void store_narrow(double* p, Vec<double> v) { store(p, v); }
static inline void store_narrow(float* p, Vec<double> wide) {
  typedef float Floats __attribute__((vector_size(kVecBytes / 2)));
  const Floats v = __builtin_convertvector(wide, Floats);
  __builtin_memcpy(p, &v, sizeof(v));
}

// relu that keeps NaN; std::max and maxps(x, 0) lose it.
template <class X>
static inline X relu(X x) {
  return x < 0 ? X{} : x;
}

// --- storage types: compute type and conversions -------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class S>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeType<S>::type;

static inline uint32_t float_bits(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, sizeof(u));
  return u;
}
static inline float bits_float(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof(x));
  return x;
}

static inline float to_compute(float x) { return x; }
static inline double to_compute(double x) { return x; }
static inline float to_compute(BFloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
static inline float to_compute(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude < 0x400) {                                                                    // zero, subnormal: exact
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  return bits_float(sign | ((magnitude << 13) + (112u << 23)));
#endif
}

// Round to nearest even.
static inline void from_compute(float x, float* out) { *out = x; }
static inline void from_compute(double x, double* out) { *out = x; }
static inline void from_compute(float x, BFloat16* out) {
  const uint32_t u = float_bits(x);
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void from_compute(float x, Half* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t u = float_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {  // NaN
    out->bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to inf
    out->bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at 2^-24
    out->bits = sign | static_cast<uint16_t>(float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000);
  } else {
    out->bits = sign | static_cast<uint16_t>((magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13);
  }
#endif
}

// Whole vectors of storage values.
static inline Vec<float> load_compute(const float* p) { return load(p); }
static inline Vec<double> load_compute(const double* p) { return load(p); }
static inline void store_compute(float* p, Vec<float> v) { store(p, v); }
static inline void store_compute(double* p, Vec<double> v) { store(p, v); }

#if defined(__AVX512F__)
static inline Vec<float> load_compute(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store_compute(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
static inline Vec<float> load_compute(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store_compute(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
static inline Vec<float> load_compute(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_compute(p[i]);
  return v;
}
static inline void store_compute(Half* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) from_compute(v[i], p + i);
}
#endif

typedef uint16_t HalfBits __attribute__((vector_size(kVecBytes / 2)));
typedef uint32_t FloatBits __attribute__((vector_size(kVecBytes)));

static inline Vec<float> load_compute(const BFloat16* p) {
  HalfBits bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  const FloatBits wide = __builtin_convertvector(bits, FloatBits) << 16;
  return (Vec<float>)wide;  // same bits, as a cast between vectors always means
}
static inline void store_compute(BFloat16* p, Vec<float> v) {
  const FloatBits u = (FloatBits)v;
  const FloatBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const FloatBits quiet_nan = FloatBits{} + 0x7fc0;
  const HalfBits bits = __builtin_convertvector(v != v ? quiet_nan : rounded, HalfBits);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// The first `count` < kLanes values, zeros after them; and the store that touches no more than `count` values.
template <class S>
static inline Vec<Compute<S>> load_compute(const S* p, int64_t count) {
  S values[kLanes<Compute<S>>] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load_compute(values);
}
template <class S>
static inline void store_compute(S* p, Vec<Compute<S>> v, int64_t count) {
  S values[kLanes<Compute<S>>];
  store_compute(values, v);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

#if defined(__AVX512F__)
static inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

template <>
inline Vec<float> load_compute<float>(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), p);
}
template <>
inline Vec<float> load_compute<Half>(const Half* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
template <>
inline Vec<float> load_compute<BFloat16>(const BFloat16* p, int64_t count) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
template <>
inline void store_compute<float>(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), v);
}
template <>
inline void store_compute<Half>(Half* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
static inline __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
template <>
inline Vec<float> load_compute<float>(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
template <>
inline void store_compute<float>(float* p, Vec<float> v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}
#endif

// --- transpose of kLanes rows by 4 columns: out[c][r] = src[r * ld + c] --------------------------------------------

template <class T>
static inline void transpose_lanes_by_4(const T* src, int64_t ld, T* dst, int64_t ld_dst) {
  for (int c = 0; c < 4; ++c) {
    for (int r = 0; r < kLanes<T>; ++r) dst[c * ld_dst + r] = src[r * ld + c];
  }
}

#if defined(__x86_64__)
// 128-bit lane j of in[i] holds row 4j + i, so a 4x4 transpose inside every lane finishes the job.
template <>
inline void transpose_lanes_by_4<float>(const float* src, int64_t ld, float* dst, int64_t ld_dst) {
#if defined(__AVX512F__)
  __m512 in[4];
  for (int i = 0; i < 4; ++i) {
    const float* p = src + i * ld;
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 4 * ld), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 8 * ld), 2);
    in[i] = _mm512_insertf32x4(v, _mm_loadu_ps(p + 12 * ld), 3);
  }
  const __m512d lo01 = _mm512_castps_pd(_mm512_unpacklo_ps(in[0], in[1]));
  const __m512d hi01 = _mm512_castps_pd(_mm512_unpackhi_ps(in[0], in[1]));
  const __m512d lo23 = _mm512_castps_pd(_mm512_unpacklo_ps(in[2], in[3]));
  const __m512d hi23 = _mm512_castps_pd(_mm512_unpackhi_ps(in[2], in[3]));
  store(dst, _mm512_castpd_ps(_mm512_unpacklo_pd(lo01, lo23)));
  store(dst + ld_dst, _mm512_castpd_ps(_mm512_unpackhi_pd(lo01, lo23)));
  store(dst + 2 * ld_dst, _mm512_castpd_ps(_mm512_unpacklo_pd(hi01, hi23)));
  store(dst + 3 * ld_dst, _mm512_castpd_ps(_mm512_unpackhi_pd(hi01, hi23)));
#elif defined(__AVX2__)
  __m256 in[4];
  for (int i = 0; i < 4; ++i) {
    const float* p = src + i * ld;
    in[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 4 * ld), 1);
  }
  const __m256d lo01 = _mm256_castps_pd(_mm256_unpacklo_ps(in[0], in[1]));
  const __m256d hi01 = _mm256_castps_pd(_mm256_unpackhi_ps(in[0], in[1]));
  const __m256d lo23 = _mm256_castps_pd(_mm256_unpacklo_ps(in[2], in[3]));
  const __m256d hi23 = _mm256_castps_pd(_mm256_unpackhi_ps(in[2], in[3]));
  store(dst, _mm256_castpd_ps(_mm256_unpacklo_pd(lo01, lo23)));
  store(dst + ld_dst, _mm256_castpd_ps(_mm256_unpackhi_pd(lo01, lo23)));
  store(dst + 2 * ld_dst, _mm256_castpd_ps(_mm256_unpacklo_pd(hi01, hi23)));
  store(dst + 3 * ld_dst, _mm256_castpd_ps(_mm256_unpackhi_pd(hi01, hi23)));
#else
  __m128 in[4];
  for (int i = 0; i < 4; ++i) in[i] = _mm_loadu_ps(src + i * ld);
  _MM_TRANSPOSE4_PS(in[0], in[1], in[2], in[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(dst + i * ld_dst, in[i]);
#endif
}
#endif

// --- transpose of kLanes vectors in registers: rows[c][r] becomes what rows[r][c] was -------------------------------

template <class T>
static inline void transpose_square(Vec<T>* rows) {
  constexpr int L = kLanes<T>;
  Vec<T> out[L];
  for (int r = 0; r < L; ++r) {
    for (int c = 0; c < L; ++c) out[c][r] = rows[r][c];
  }
  for (int r = 0; r < L; ++r) rows[r] = out[r];
}

#if defined(__AVX512F__) || defined(__AVX2__)
template <>
inline void transpose_square<float>(Vec<float>* rows) {
  constexpr int L = kLanes<float>;
  // 4 x 4 blocks inside 128-bit lanes: block[4 g + c] holds in lane j the rows 4 g ... 4 g + 3 of column 4 j + c.
  Vec<float> block[L];
#pragma GCC unroll 4
  for (int g = 0; g < L; g += 4) {
#if defined(__AVX512F__)
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[g], rows[g + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[g], rows[g + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[g + 2], rows[g + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[g + 2], rows[g + 3]));
    block[g] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    block[g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    block[g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    block[g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
#else
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(rows[g], rows[g + 1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(rows[g], rows[g + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(rows[g + 2], rows[g + 3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(rows[g + 2], rows[g + 3]));
    block[g] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    block[g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    block[g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    block[g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
#endif
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
#if defined(__AVX512F__)
    const __m512 even01 = _mm512_shuffle_f32x4(block[c], block[4 + c], 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(block[c], block[4 + c], 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(block[8 + c], block[12 + c], 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(block[8 + c], block[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[4 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    rows[12 + c] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
#else
    rows[c] = _mm256_permute2f128_ps(block[c], block[4 + c], 0x20);
    rows[4 + c] = _mm256_permute2f128_ps(block[c], block[4 + c], 0x31);
#endif
  }
}
#endif

}  // namespace efficientvit_kernels::cpu::EVK_ISA
