// Vectors of 8 float32: AVX2 and FMA. The same names as in vectors_avx512.h.
#pragma once

#include "../types.h"

namespace rlrr {
namespace {

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

// The first `count` lanes; count from 0 to 8
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

// To bfloat16 as narrow() rounds, still in float32
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
  // t[4 g + c] holds, in each half l, rows 4 g ... 4 g + 3 of column 4 l + c
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    r[c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x20);
    r[4 + c] = _mm256_permute2f128_ps(t[c], t[4 + c], 0x31);
  }
}

}  // namespace
}  // namespace rlrr
