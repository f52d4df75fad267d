// The innermost loop: one tile of a product, its sums in registers.
#pragma once

#include "units.h"

namespace rlrr {
namespace {

// One unit, wherever it comes from: it aliases float32 and pairs of bfloat16, which may begin at any of them
typedef uint32_t Word __attribute__((may_alias, aligned(2)));

struct Tile {
  __m512 sum[tile_rows][vectors];
};

// Rows of the left operand, units apart by `unit_step`, rows by `row_step`
struct Rows {
  const Word* data;
  int64_t row_step, unit_step;
};

// sum over p of left(i, p) * right[p][j]; right is packed [units][tile_cols]
template <class Unit>
inline __attribute__((always_inline)) void multiply(Rows left, const Word* right, int64_t units, Tile& tile) {
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < vectors; ++j) tile.sum[i][j] = _mm512_setzero_ps();
  }
  // two base addresses: x86 reaches four rows from each without arithmetic
  const Word *near = left.data, *far = left.data + 4 * left.row_step;
  for (int64_t p = 0; p < units; ++p) {
    __m512i cols[vectors];
#pragma GCC unroll 3
    for (int j = 0; j < vectors; ++j) cols[j] = _mm512_loadu_si512(right + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
      const Word* word = (i < 4 ? near : far) + (i % 4) * left.row_step;
      const __m512i row = _mm512_set1_epi32(static_cast<int>(*word));
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) tile.sum[i][j] = Unit::multiply_add(tile.sum[i][j], row, cols[j]);
    }
    near += left.unit_step;
    far += left.unit_step;
    right += tile_cols;
  }
}

// As multiply, for sums of any length: by parts, which are then added
template <class Unit>
Tile multiply_long(Rows left, const Word* right, int64_t units) {
  Tile total;
  multiply<Unit>(left, right, std::min(units, max_units), total);
  for (int64_t done = max_units; done < units; done += max_units) {
    left.data += max_units * left.unit_step;
    right += max_units * tile_cols;
    Tile part;
    multiply<Unit>(left, right, std::min(units - done, max_units), part);
    for (int i = 0; i < tile_rows; ++i) {
      for (int j = 0; j < vectors; ++j) total.sum[i][j] = _mm512_add_ps(total.sum[i][j], part.sum[i][j]);
    }
  }
  return total;
}

}  // namespace
}  // namespace rlrr
