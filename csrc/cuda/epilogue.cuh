// From an accumulator to a row-major matrix: one rounding, two elements a store where they may go
// together.
#pragma once

#include "numeric.cuh"
#include "tile.cuh"

namespace rlrr {

template <bool kPairs, class Tile, class T, class Term>
RLRR_DEVICE void store_values(const typename Tile::Accumulator& acc, T* to, int64_t row_stride, int rows, int cols,
                              const Term& term) {
  const Lane l = lane();
  const int first_row = Tile::warp_row() + l.g;
#pragma unroll
  for (int j = 0; j < Tile::kColTiles; ++j) {
    const int col = Tile::warp_col() + 8 * j + 2 * l.t;
    if (col >= cols) continue;
    const bool both = kPairs || col + 1 < cols;
    const float low_term = term(col), high_term = both ? term(col + 1) : 0.0f;
    T* at = to + first_row * row_stride + col;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i, at += 8 * row_stride) {
      if (first_row + 8 * i >= rows) continue;
      const float low = acc[i / 2][j][i % 2 * 2] + low_term, high = acc[i / 2][j][i % 2 * 2 + 1] + high_term;
      if constexpr (kPairs && sizeof(T) == 4) {
        ptx::store(reinterpret_cast<float2*>(at), float2{low, high});
      } else if constexpr (kPairs) {
        ptx::store(reinterpret_cast<uint32_t*>(at), ptx::narrow2<T>(low, high));
      } else {
        ptx::store(at, narrow<T>(low));
        if (both) ptx::store(at + 1, narrow<T>(high));
      }
    }
  }
}

// `to` is the tile's first element, `rows` x `cols` of the tile lie inside the matrix, and
// `term(col)` is added to a column. An odd row length puts every other row's pairs astride two words.
template <class Tile, class T, class Term>
RLRR_DEVICE void store_tile(const typename Tile::Accumulator& acc, T* to, int64_t row_stride, int rows, int cols,
                            const Term& term) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0 && row_stride % 2 == 0;
  if (aligned && cols % 2 == 0) {
    store_values<true, Tile>(acc, to, row_stride, rows, cols, term);
  } else {
    store_values<false, Tile>(acc, to, row_stride, rows, cols, term);
  }
}

}  // namespace rlrr
