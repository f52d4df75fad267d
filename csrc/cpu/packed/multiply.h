// The innermost loop: one tile of a product, its sums in vector registers. multiply_amx.h has the same names.
#pragma once

#include "units.h"

namespace rlrr {
namespace {

// AVX2: 12 sums, 2 columns of operands and a broadcast row are 15 of the 16 registers.
// AVX-512: 24 sums, 3 columns and a row are 28 of the 32.
constexpr int64_t tile_rows = lanes == 8 ? 6 : 8, tile_vectors = lanes == 8 ? 2 : 3, tile_cols = tile_vectors * lanes;
// Tiles of W' that a thread forms at a time
constexpr int64_t panel_tiles = lanes == 8 ? 3 : 1;
// Tiles of G below each other that share a packed dy
constexpr int64_t strip_tiles = 4;
// Units are multiplied in whole multiples of this
constexpr int64_t unit_multiple = 1;
// Units summed in one go: float32 sums of thousands of terms one after another lose two bits that a BLAS keeps
constexpr int64_t max_units = 256;

// What a thread holds while it multiplies
struct Multiplier {};

struct Tile {
  Vector sum[tile_rows][tile_vectors];
};

inline void clear(Tile& tile) {
  for (auto& row : tile.sum) std::fill_n(row, tile_vectors, zero());
}

// sum over p of left[i * row_step + p * unit_step] * right[p][j]; right is packed [units][tile_cols]
template <class Unit, int64_t unit_step>
inline __attribute__((always_inline)) void multiply(const Word* left, int64_t row_step, const Word* right,
                                                    int64_t units, Tile& tile) {
  constexpr int half = tile_rows / 2;
  Vector sum[tile_rows][tile_vectors];
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) sum[i][j] = zero();
  }
  // two base addresses: x86 reaches half of the rows from each without arithmetic
  const Word *near = left, *far = left + half * row_step;
  for (int64_t p = 0; p < units; ++p) {
    Vector cols[tile_vectors];
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) cols[j] = load(right + j * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < tile_rows; ++i) {
      const Vector row = broadcast((i < half ? near : far) + (i % half) * row_step);
#pragma GCC unroll 3
      for (int j = 0; j < tile_vectors; ++j) sum[i][j] = Unit::multiply(row, cols[j], sum[i][j]);
    }
    near += unit_step;
    far += unit_step;
    right += tile_cols;
  }
#pragma GCC unroll 8
  for (int i = 0; i < tile_rows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < tile_vectors; ++j) tile.sum[i][j] = sum[i][j];
  }
}

// total += left right, or = if `fresh`, for sums of any length along rows of `left`: by parts, each of which is added
template <class Unit>
void add_product(const Word* left, int64_t row_step, const Word* right, int64_t units, bool fresh, Tile& total) {
  if (fresh) clear(total);
  for (int64_t done = 0; done < units; done += max_units) {
    Tile part;
    multiply<Unit, 1>(left + done, row_step, right + done * tile_cols, std::min(units - done, max_units), part);
    for (int i = 0; i < tile_rows; ++i) {
      for (int j = 0; j < tile_vectors; ++j) total.sum[i][j] = total.sum[i][j] + part.sum[i][j];
    }
  }
}

// A strip of dy is packed [units][strip_rows]
template <class Unit>
inline void multiply_strip(const Word* strip, int64_t row, const Word* right, int64_t units, Tile& tile) {
  multiply<Unit, strip_tiles * tile_rows>(strip + row, 1, right, units, tile);
}

}  // namespace
}  // namespace rlrr
