// Vectors of float32, and the 32-bit units along a sum that the kernels multiply: one float32 or two neighbouring
// bfloat16.
//
// All headers of this folder have internal linkage, since each file that includes them is compiled for another
// instruction set. It defines which: RLRR_AVX512, or AVX2 without it; RLRR_BFLOAT16_PAIRS for products of bfloat16;
// RLRR_AMX for tiles.
#pragma once

#include <algorithm>

#include "../types.h"

namespace rlrr {
namespace {

#if defined(RLRR_AVX512)

typedef __m512 Vector;
constexpr int64_t lanes = 16;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vector a) { return _mm512_reduce_add_ps(a); }

// Selects the first `count` lanes; count from 0 to 16
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
inline Vector keep(Vector a, int64_t count) { return _mm512_maskz_mov_ps(first_lanes(count), a); }

inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline Vector load(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
inline void store(float* to, Vector a) { _mm512_storeu_ps(to, a); }
inline void store(float* to, Vector a, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), a); }

inline Vector widened(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline Vector load(const bfloat16* from) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline Vector load(const bfloat16* from, int64_t count) {
  return widened(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

// Rounds to bfloat16 as narrow() does; the result is still float32
inline Vector rounded(Vector a) {
  const __m512i bits = _mm512_castps_si512(a), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i nearest = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i either = _mm512_mask_or_epi32(nearest, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_castsi512_ps(_mm512_and_si512(either, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline void store(bfloat16* to, Vector a, int64_t count = lanes) {
#if defined(RLRR_BFLOAT16_PAIRS)
  const __m256i bits = (__m256i)_mm512_cvtneps_pbh(a);
#else
  const __m256i bits = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(rounded(a)), 16));
#endif
  _mm256_mask_storeu_epi16(to, first_lanes(count), bits);
}

inline void transpose(Vector (&r)[lanes]) {
  Vector t[lanes];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const Vector a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
    const Vector c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
  // quarter l of t[4 g + c] holds rows 4 g ... 4 g + 3 of column 4 l + c
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const Vector a = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x44), b = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xEE);
    const Vector e = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x44);
    const Vector f = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xEE);
    r[c] = _mm512_shuffle_f32x4(a, e, 0x88);
    r[4 + c] = _mm512_shuffle_f32x4(a, e, 0xDD);
    r[8 + c] = _mm512_shuffle_f32x4(b, f, 0x88);
    r[12 + c] = _mm512_shuffle_f32x4(b, f, 0xDD);
  }
}

#else

typedef __m256 Vector;
constexpr int64_t lanes = 8;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

inline float sum(Vector a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// Selects the first `count` lanes; count from 0 to 8
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector keep(Vector a, int64_t count) { return _mm256_and_ps(a, _mm256_castsi256_ps(first_lanes(count))); }

inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector load(const float* from, int64_t count) { return _mm256_maskload_ps(from, first_lanes(count)); }
inline void store(float* to, Vector a) { _mm256_storeu_ps(to, a); }
inline void store(float* to, Vector a, int64_t count) { _mm256_maskstore_ps(to, first_lanes(count), a); }

inline Vector load(const bfloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vector load(const bfloat16* from, int64_t count) {
  bfloat16 copy[lanes] = {};
  std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(bfloat16));
  return load(copy);
}

// Rounds to bfloat16 as narrow() does; the result is still float32
inline Vector rounded(Vector a) {
  const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i nearest = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const Vector nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const Vector quiet = _mm256_or_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x400000)));
  const Vector high = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xFFFF0000)));
  return _mm256_and_ps(_mm256_blendv_ps(_mm256_castsi256_ps(nearest), quiet, nan), high);
}
inline void store(bfloat16* to, Vector a) {
  const __m256i bits = _mm256_srli_epi32(_mm256_castps_si256(rounded(a)), 16);
  const __m128i both = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), both);
}
inline void store(bfloat16* to, Vector a, int64_t count) {
  bfloat16 copy[lanes];
  store(copy, a);
  std::memcpy(to, copy, static_cast<size_t>(count) * sizeof(bfloat16));
}

inline void transpose(Vector (&r)[lanes]) {
  Vector t[lanes];
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const Vector a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const Vector c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
  // half l of t[4 g + c] holds rows 4 g ... 4 g + 3 of column 4 l + c
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x20);
    r[4 + c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x31);
  }
}

#endif

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A unit in memory. It aliases float32 and pairs of bfloat16; pairs can begin at any bfloat16.
typedef uint32_t Word __attribute__((may_alias, aligned(2)));

inline Vector broadcast(const Word* word) {
  float value;
  std::memcpy(&value, word, sizeof value);
  return broadcast(value);
}
inline Vector load(const Word* from) { return load(reinterpret_cast<const float*>(from)); }
inline void store(Word* to, Vector a) { store(reinterpret_cast<float*>(to), a); }

// The elements of a row from `from` on, `step` apart, in float32, and 0 from index `count` on, which can be 0 or less
template <class T>
inline Vector load_row(const T* from, int64_t step, int64_t count) {
  if (count <= 0) return zero();
  if (step == 1) return count >= lanes ? load(from) : load(from, count);
  float values[lanes] = {};
  for (int64_t i = 0; i < std::min(lanes, count); ++i) values[i] = widen(from[i * step]);
  return load(values);
}

// A unit type defines an element in memory, the number of elements of a unit, how W' is rounded, and how vectors of
// elements become vectors of units: `across` takes a vector for each element of the units, `along` vectors in which the
// elements of a unit are neighbours.
struct Float32 {
  using Element = float;
  static constexpr int64_t elements = 1;
  static constexpr bool in_place = true;  // rows in memory are rows of units

  static Vector multiply(Vector row, Vector cols, Vector sum) { return multiply_add(row, cols, sum); }
  static Vector round(Vector a) { return a; }
  static Vector across(const Vector (&rows)[1]) { return rows[0]; }
  static Vector along(const Vector (&parts)[1]) { return parts[0]; }
};

// For CPUs without products of bfloat16: in float32 these are exact
struct WidenedBFloat16 : Float32 {
  using Element = bfloat16;
  static constexpr bool in_place = false;

  static Vector round(Vector a) { return rounded(a); }
};

#if defined(RLRR_BFLOAT16_PAIRS)
struct BFloat16Pair {
  using Element = bfloat16;
  static constexpr int64_t elements = 2;
  static constexpr bool in_place = true;

  static Vector multiply(Vector row, Vector cols, Vector sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)cols);
  }
  static Vector round(Vector a) { return a; }  // the conversions do
  static Vector join(__m256i first, __m256i second) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
  }
  // `count` elements of two rows, without a conversion to float32; null stands for zeros
  static Vector pairs(const bfloat16* first, const bfloat16* second, int64_t count) {
    const auto row = [&](const bfloat16* from) {
      return from ? _mm256_maskz_loadu_epi16(first_lanes(count), from) : _mm256_setzero_si256();
    };
    return join(row(first), row(second));
  }
  static Vector across(const Vector (&rows)[2]) {
    return join((__m256i)_mm512_cvtneps_pbh(rows[0]), (__m256i)_mm512_cvtneps_pbh(rows[1]));
  }
  static Vector along(const Vector (&parts)[2]) { return (Vector)_mm512_cvtne2ps_pbh(parts[1], parts[0]); }
};
#endif

}  // namespace
}  // namespace rlrr
