// y = x W'^T + offset and dx = dy W': the same product, with W' packed by rows or by columns.
//
// A thread forms the columns of W' that it multiplies by, a tile at a time, in a scratch of its own that
// stays in its cache; the left operand is read where it lies. One parallel region, nothing is shared.
#pragma once

#include <cstring>

#include "../runtime.h"
#include "pack.h"

namespace rlrr {
namespace {

constexpr int64_t part_rows = 768;

// Rows of the left operand as units along the sum: in place, or copied where they lie otherwise
template <class Unit>
Rows left_rows(const Matrix& a, int64_t first, Word* copy) {
  using T = typename Unit::Element;
  const int64_t units = up(a.cols, Unit::elements), rows = std::min(tile_rows, a.rows - first);
  const bool in_place =
      a.col_stride == 1 && a.cols % Unit::elements == 0 && a.row_stride % Unit::elements == 0 && rows == tile_rows;
  if (in_place) return {reinterpret_cast<const Word*>(a.at<T>(first, 0)), a.row_stride / Unit::elements, 1};
  std::memset(copy, 0, static_cast<size_t>(tile_rows * units) * sizeof(Word));
  for (int64_t i = 0; i < rows; ++i) {
    T* row = reinterpret_cast<T*>(copy + i * units);
    if (a.col_stride == 1) {
      std::memcpy(row, a.at<T>(first + i, 0), static_cast<size_t>(a.cols) * sizeof(T));
    } else {
      for (int64_t c = 0; c < a.cols; ++c) row[c] = *a.at<T>(first + i, c);
    }
  }
  return {copy, units, 1};
}

template <class Unit>
void store(const Tile& tile, const float* offset, const Matrix& out, int64_t row, int64_t col) {
  using T = typename Unit::Element;
  const int64_t rows = std::min(tile_rows, out.rows - row);
  for (int64_t j = 0; j < vectors; ++j) {
    const __mmask16 inside = first_lanes(out.cols - col - j * lanes);
    if (inside == 0) break;
    const __m512 add = offset ? load_wide(offset + col + j * lanes, inside) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      Unit::store(out.at<T>(row + i, col + j * lanes), _mm512_add_ps(tile.sum[i][j], add), inside);
    }
  }
}

// Lines that will be touched next: the start of the next rows, from where the hardware goes on by itself,
// and the place of this tile's results
template <class T>
void prefetch_rows(const Matrix& a, int64_t first, int64_t col, int64_t count) {
  for (int64_t row = first; row < std::min(first + tile_rows, a.rows); ++row) {
    for (int64_t c = 0; c < count; c += 64 / int64_t{sizeof(T)}) prefetch(a.at<T>(row, col + c));
  }
}

// out = left [W' as `pack` packs it] + offset. pack(first column, to).
template <class Unit, class Pack>
void multiply_by_rescaled(const Matrix& left, const float* offset, const Matrix& out, const Pack& pack, Word* scratch,
                          int64_t threads) {
  const int64_t units = up(left.cols, Unit::elements), tile_words = units * tile_cols;
  const int64_t col_tiles = up(out.cols, tile_cols), row_tiles = up(out.rows, tile_rows);
  // rows in parts that stay in the last cache while W' passes by, and enough of them for all threads;
  // W' is formed anew for each part
  const int64_t row_parts = std::max(up(row_tiles, part_rows / tile_rows),
                                     std::clamp<int64_t>(up(2 * threads, col_tiles), 1, up(row_tiles, 8)));
  const int64_t part_tiles = up(row_tiles, row_parts), tasks = col_tiles * row_parts;
  // contiguous parts, one a thread, so that a part's place in the scratch is known without asking
  const int64_t part_tasks = up(tasks, threads);
  parallel_for(0, up(tasks, part_tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      Word *packed = scratch + part * (tile_words + tile_rows * units), *copy = packed + tile_words;
      int64_t packed_tile = -1;
      for (int64_t task = part * part_tasks; task < std::min(tasks, (part + 1) * part_tasks); ++task) {
        const int64_t col_tile = task % col_tiles, first = task / col_tiles * part_tiles;
        if (col_tile != packed_tile) pack(col_tile * tile_cols, packed);
        packed_tile = col_tile;
        for (int64_t t = first; t < std::min(row_tiles, first + part_tiles); ++t) {
          prefetch_rows<typename Unit::Element>(left, (t + 1) * tile_rows, 0, lanes);
          prefetch_rows<typename Unit::Element>(out, t * tile_rows, col_tile * tile_cols, tile_cols);
          const Tile tile = multiply_long<Unit>(left_rows<Unit>(left, t * tile_rows, copy), packed, units);
          store<Unit>(tile, offset, out, t * tile_rows, col_tile * tile_cols);
        }
      }
    }
  });
}

}  // namespace
}  // namespace rlrr
