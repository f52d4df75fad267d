// What the kernels here multiply: 32-bit units along the sum, one float32 or two neighbouring bfloat16.
//
// Everything in this folder's headers has internal linkage: each file that includes them is compiled for
// an instruction set of its own. They are written for a namespace that RLRR_ISA names.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "blocks.h"

namespace rlrr {
namespace {

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, lanes)) - 1);
}

__m512 load_wide(const float* from, __mmask16 inside) { return _mm512_maskz_loadu_ps(inside, from); }
__m512 load_wide(const bfloat16* from, __mmask16 inside) {
  const __m256i bits = _mm256_maskz_loadu_epi16(inside, from);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 16 elements of a row from `col` on in float32, whatever their stride; 0 from `end` on
template <class T>
__m512 load_row(const Matrix& a, int64_t row, int64_t col, int64_t end) {
  const __mmask16 inside = first_lanes(end - col);
  if (a.col_stride == 1) return load_wide(a.at<T>(row, col), inside);
  alignas(64) float values[lanes] = {};
  for (int64_t i = 0; i < std::min(lanes, end - col); ++i) values[i] = widen(*a.at<T>(row, col + i));
  return _mm512_load_ps(values);
}

struct Float32 {
  using Element = float;
  static constexpr int64_t elements = 1;

  static __m512 multiply_add(__m512 sum, __m512i row, __m512i cols) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(cols), sum);
  }
  static void store(float* to, __m512 values, __mmask16 inside) { _mm512_mask_storeu_ps(to, inside, values); }

  // 16 columns of one row, as units of a sum that runs over rows
  static __m512i from_rows(const __m512 (&rows)[1]) { return _mm512_castps_si512(rows[0]); }
  // 16 units of a row, as units of a sum that runs along it
  static __m512i from_row(const __m512 (&parts)[1]) { return _mm512_castps_si512(parts[0]); }
};

#if defined(RLRR_AVX512_BF16)
struct BFloat16 {
  using Element = bfloat16;
  static constexpr int64_t elements = 2;

  static __m512 multiply_add(__m512 sum, __m512i row, __m512i cols) {
    return _mm512_dpbf16_ps(sum, (__m512bh)row, (__m512bh)cols);
  }
  static void store(bfloat16* to, __m512 values, __mmask16 inside) {
    _mm256_mask_storeu_epi16(to, inside, (__m256i)_mm512_cvtneps_pbh(values));
  }

  static __m512i from_rows(const __m512 (&rows)[2]) {
    const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows[0]));
    const __m512i second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(rows[1]));
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
  }
  static __m512i from_row(const __m512 (&parts)[2]) { return (__m512i)_mm512_cvtne2ps_pbh(parts[1], parts[0]); }
};
#endif

}  // namespace
}  // namespace rlrr
