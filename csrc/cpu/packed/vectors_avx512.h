// Vectors of 16 float32: AVX-512 F, BW, VL and DQ. The same names as in vectors_avx2.h.
#pragma once

#include "../types.h"

namespace rlrr {
namespace {

typedef __m512 Vector;
constexpr int64_t lanes = 16;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vector a) { return _mm512_reduce_add_ps(a); }

// The first `count` lanes; count from 0 to 16
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

// To bfloat16 as narrow() rounds, still in float32
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
  // t[4 g + c] holds, in each quarter l, rows 4 g ... 4 g + 3 of column 4 l + c
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

}  // namespace
}  // namespace rlrr
