// Operands in the order in which the product reads them; W is rescaled on the way.
#pragma once

#include "multiply.h"

namespace rlrr {
namespace {

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

// 16 rows of W' from `row` on, 16 units from `col` on, a register a row. `whole`: all of it lies inside W,
// in one group and in rows without gaps, so that nothing needs to be asked of an element.
template <class Unit, class W, bool whole>
void rescale_block(const Layer& layer, int64_t row, int64_t col, __m512i (&block)[lanes]) {
  const int64_t n = layer.n(), k = layer.k();
  const float *u = static_cast<const float*>(layer.u) + row, *v = static_cast<const float*>(layer.v) + col;
  const __mmask16 all = 0xFFFF;
  __m512 scale_in[Unit::elements];
  if constexpr (whole) {
    for (int64_t e = 0; e < Unit::elements; ++e) {
      scale_in[e] = load_wide(v + layer.group_of(row) * k + e * lanes, all);
    }
  }
  const W* w = layer.weight.at<W>(row, col);
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i, w += layer.weight.row_stride) {
    __m512 parts[Unit::elements];
    if (whole) prefetch(w + 128);
    for (int64_t e = 0; e < Unit::elements; ++e) {
      const int64_t at = col + e * lanes;
      if constexpr (whole) {
        parts[e] = rescale(load_wide(w + e * lanes, all), _mm512_set1_ps(u[i]), scale_in[e]);
      } else if (row + i < n && at < k) {
        const __mmask16 inside = first_lanes(k - at);
        const __m512 scale = load_wide(v + layer.group_of(row + i) * k + e * lanes, inside);
        const __m512 scaled = rescale(load_row<W>(layer.weight, row + i, at, k), _mm512_set1_ps(u[i]), scale);
        parts[e] = _mm512_maskz_mov_ps(inside, scaled);  // an infinite u would make the padding NaN
      } else {
        parts[e] = _mm512_setzero_ps();
      }
    }
    block[i] = Unit::from_row(parts);
  }
}

// Rows first... of W' as columns of a sum over K: [units of K][tile_cols]. Rows past N are 0.
template <class Unit, class W>
void pack_rescaled_rows(const Layer& layer, int64_t first, Word* packed) {
  const int64_t n = layer.n(), k = layer.k(), units = up(k, Unit::elements);
  for (int64_t col = 0; col < tile_cols; col += lanes) {
    const int64_t row = first + col;
    const bool whole =
        layer.weight.col_stride == 1 && row + lanes <= n && layer.group_of(row) == layer.group_of(row + lanes - 1);
    for (int64_t unit = 0; unit < units; unit += lanes) {
      __m512i block[lanes];
      if (whole && (unit + lanes) * Unit::elements <= k) {
        rescale_block<Unit, W, true>(layer, row, unit * Unit::elements, block);
      } else {
        rescale_block<Unit, W, false>(layer, row, unit * Unit::elements, block);
      }
      transpose(block);
      Word* to = packed + unit * tile_cols + col;
      const int64_t count = std::min(lanes, units - unit);
      for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(to + i * tile_cols, block[i]);
    }
  }
}

// Columns first... of W' as columns of a sum over N: [units of N][tile_cols]. Columns past K are 0.
template <class Unit, class W>
void pack_rescaled_cols(const Layer& layer, int64_t first, Word* packed) {
  const int64_t n = layer.n(), k = layer.k(), units = up(n, Unit::elements), group_rows = n / layer.groups;
  const float *u = static_cast<const float*>(layer.u), *v = static_cast<const float*>(layer.v);
  __m512 scale_in[vectors];
  int64_t group_end = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    __m512 rows[vectors][Unit::elements];
    for (int64_t e = 0; e < Unit::elements; ++e) {
      const int64_t row = unit * Unit::elements + e;
      if (row == group_end) {
        group_end += group_rows;
        for (int64_t j = 0; j < vectors; ++j) {
          const int64_t col = first + j * lanes;
          scale_in[j] =
              load_wide(v + layer.group_of(std::min(row, n - 1)) * k + std::min(col, k), first_lanes(k - col));
        }
      }
      if (row >= n) {
        for (int64_t j = 0; j < vectors; ++j) rows[j][e] = _mm512_setzero_ps();
        continue;
      }
      const __m512 scale_out = _mm512_set1_ps(u[row]);
#pragma GCC unroll 3
      for (int64_t j = 0; j < vectors; ++j) {
        const int64_t col = first + j * lanes;
        prefetch(layer.weight.at<W>(row + 16, col));
        const __m512 w = col < k ? load_row<W>(layer.weight, row, col, k) : _mm512_setzero_ps();
        rows[j][e] = rescale(w, scale_out, scale_in[j]);
      }
    }
    for (int64_t j = 0; j < vectors; ++j) {
      _mm512_storeu_si512(packed + unit * tile_cols + j * lanes, Unit::from_rows(rows[j]));
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
    rows[e] = token < a.rows && col < end ? load_row<typename Unit::Element>(a, token, col, end) : _mm512_setzero_ps();
  }
  return Unit::from_rows(rows);
}

}  // namespace
}  // namespace rlrr
