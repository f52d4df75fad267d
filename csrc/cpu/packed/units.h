// What the kernels multiply: 32-bit units along the sum, one float32 or two neighbouring bfloat16.
//
// Everything in this folder's headers has internal linkage: each file that includes them is compiled for a set of
// instructions of its own, after it has included the vectors of that set.
#pragma once

#include <algorithm>

#include "../types.h"

namespace rlrr {
namespace {

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One unit, wherever it comes from: it aliases float32 and pairs of bfloat16, which may begin at any of them
typedef uint32_t Word __attribute__((may_alias, aligned(2)));

inline Vector broadcast(const Word* word) {
  float value;
  std::memcpy(&value, word, sizeof value);
  return broadcast(value);
}
inline Vector load(const Word* from) { return load(reinterpret_cast<const float*>(from)); }
inline void store(Word* to, Vector a) { store(reinterpret_cast<float*>(to), a); }

// A row's elements from `from` on, `step` apart, in float32; 0 from `count` on, which may be 0 or less
template <class T>
inline Vector load_row(const T* from, int64_t step, int64_t count) {
  if (count <= 0) return zero();
  if (step == 1) return count >= lanes ? load(from) : load(from, count);
  float values[lanes] = {};
  for (int64_t i = 0; i < std::min(lanes, count); ++i) values[i] = widen(from[i * step]);
  return load(values);
}

// A unit type says what an element is in memory, how many make a unit, how W' is rounded, and how vectors of
// elements become vectors of units: `across` has a vector for each element of a unit, `along` a unit's elements
// side by side.
struct Float32 {
  using Element = float;
  static constexpr int64_t elements = 1;
  static constexpr bool in_place = true;  // rows in memory are rows of units

  static Vector multiply(Vector row, Vector cols, Vector sum) { return multiply_add(row, cols, sum); }
  static Vector round(Vector a) { return a; }
  static Vector across(const Vector (&rows)[1]) { return rows[0]; }
  static Vector along(const Vector (&parts)[1]) { return parts[0]; }
};

// Where no instruction multiplies bfloat16: their products are exact in float32
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
  // `count` elements of two rows as they are, without a way through float32; null: zeros
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
