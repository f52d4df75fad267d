// Operands in the order in which the product reads them; W is rescaled on the way.
#pragma once

#include "multiply.h"

namespace rlrr {
namespace {

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// w (1 + u v) in float32, by two roundings and one as the formula has it: no fused multiply-add
inline __m512 rescale(__m512 w, __m512 u, __m512 v) {
  return _mm512_mul_ps(w, _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_mul_ps(u, v)));
}

// Rows lie pages apart, and more of them are read at once than the hardware follows
inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

inline void transpose(__m512i (&r)[lanes]) {
  __m512i t[lanes];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  // t[4 g + c] holds, in each 128-bit lane l, rows 4 g ... 4 g + 3 of column 4 l + c
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(t[c], t[4 + c], 0x44), b = _mm512_shuffle_i32x4(t[c], t[4 + c], 0xEE);
    const __m512i e = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0x44);
    const __m512i f = _mm512_shuffle_i32x4(t[8 + c], t[12 + c], 0xEE);
    r[c] = _mm512_shuffle_i32x4(a, e, 0x88);
    r[4 + c] = _mm512_shuffle_i32x4(a, e, 0xDD);
    r[8 + c] = _mm512_shuffle_i32x4(b, f, 0x88);
    r[12 + c] = _mm512_shuffle_i32x4(b, f, 0xDD);
  }
}

// Rows first... of W' as columns of a sum over K: [units of K][tile_cols]. Rows past N are 0.
template <class Unit, class W>
void pack_rescaled_rows(const Layer& layer, int64_t first, Word* packed) {
  const int64_t n = layer.n(), k = layer.k(), units = up(k, Unit::elements);
  const float *u = static_cast<const float*>(layer.u), *v = static_cast<const float*>(layer.v);
  for (int64_t unit = 0; unit < units; unit += lanes) {
    for (int64_t col = 0; col < tile_cols; col += lanes) {
      __m512i block[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t row = first + col + i;
        block[i] = _mm512_setzero_si512();
        if (row >= n) continue;
        const float* v_row = v + layer.group_of(row) * k;
        __m512 parts[Unit::elements];
        for (int64_t e = 0; e < Unit::elements; ++e) {
          const int64_t at = unit * Unit::elements + e * lanes;
          if (at >= k) {
            parts[e] = _mm512_setzero_ps();
            continue;
          }
          prefetch(layer.weight.at<W>(row, at + 128));
          const __m512 scale_in = load_wide(v_row + at, first_lanes(k - at));
          parts[e] = rescale(load_row<W>(layer.weight, row, at, k), _mm512_set1_ps(u[row]), scale_in);
        }
        block[i] = Unit::from_row(parts);
      }
      transpose(block);
      for (int64_t i = 0; i < std::min(lanes, units - unit); ++i) {
        _mm512_storeu_si512(packed + (unit + i) * tile_cols + col, block[i]);
      }
    }
  }
}

// Columns first... of W' as columns of a sum over N: [units of N][tile_cols]. Columns past K are 0.
template <class Unit, class W>
void pack_rescaled_cols(const Layer& layer, int64_t first, Word* packed) {
  const int64_t n = layer.n(), k = layer.k(), units = up(n, Unit::elements);
  const float *u = static_cast<const float*>(layer.u), *v = static_cast<const float*>(layer.v);
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t j = 0; j < tile_cols; j += lanes) {
      __m512 rows[Unit::elements];
      for (int64_t e = 0; e < Unit::elements; ++e) {
        const int64_t row = unit * Unit::elements + e;
        prefetch(layer.weight.at<W>(row + 16, first + j));
        rows[e] = _mm512_setzero_ps();
        if (row >= n || first + j >= k) continue;
        const __m512 scale_in = load_wide(v + layer.group_of(row) * k + first + j, first_lanes(k - first - j));
        rows[e] = rescale(load_row<W>(layer.weight, row, first + j, k), _mm512_set1_ps(u[row]), scale_in);
      }
      _mm512_storeu_si512(packed + unit * tile_cols + j, Unit::from_rows(rows));
    }
  }
}

// 16 columns of x or dy as units of a sum over tokens, from token `unit * elements` on
template <class Unit>
__m512i token_units(const Matrix& a, int64_t unit, int64_t col, int64_t end) {
  __m512 rows[Unit::elements];
  for (int64_t e = 0; e < Unit::elements; ++e) {
    const int64_t token = unit * Unit::elements + e;
    prefetch(a.at<typename Unit::Element>(token + 16, col));
    rows[e] = token < a.rows && col < end ? load_row<typename Unit::Element>(a, token, col, end)
                                          : _mm512_setzero_ps();
  }
  return Unit::from_rows(rows);
}

}  // namespace
}  // namespace rlrr
