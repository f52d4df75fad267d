// y = x W'^T + offset and dx = dy W': the same product, with W' packed by rows or by columns.
//
// Each thread forms the columns of W' that it multiplies by, a panel at a time, in a scratch of its own that stays in
// its cache. The left operand is read in place if possible. There is one parallel region, and threads share nothing.
#pragma once

#include "../runtime.h"
#include "pack.h"

namespace rlrr {
namespace {

// Rows of the left operand that stay in the last cache while all of W' is used
constexpr int64_t part_rows = 768;
// Units of a panel: at 4 x panel_cols bytes each they stay in the L2 cache
constexpr int64_t max_chunk = 768;

// The scratch of a thread, in words: a panel of W'; rows of the left operand that cannot be read in place; and, if the
// sums of a panel are computed in several chunks and the result is not float32, these sums.
template <class Unit>
struct LinearScratch {
  int64_t units, chunk, panel, rows, sums;

  explicit LinearScratch(const Matrix& left) {
    units = up(left.cols, Unit::elements * unit_multiple) * unit_multiple;
    chunk = std::min(units, max_chunk);
    panel = chunk * panel_cols;
    rows = chunk * tile_rows;
    sums = units == chunk || dtype_of<typename Unit::Element> == Dtype::float32
               ? 0
               : up(std::min(left.rows, part_rows), tile_rows) * tile_rows * panel_cols;
  }
  int64_t words() const { return panel + rows + sums; }
};

// Rows of a matrix as units along a sum, `step` apart
struct Rows {
  const Word* data;
  int64_t step;
};

// The rows of a tile from `first` on, `units` of them from unit `from` on: in place, or copied if their layout differs
template <class Unit>
Rows left_rows(const Matrix& a, int64_t first, int64_t from, int64_t units, Word* copy) {
  using T = typename Unit::Element;
  const int64_t rows = std::min(tile_rows, a.rows - first), col = from * Unit::elements;
  if (Unit::in_place && a.col_stride == 1 && a.cols % (Unit::elements * unit_multiple) == 0 &&
      a.row_stride % Unit::elements == 0 && rows == tile_rows) {
    return {reinterpret_cast<const Word*>(a.at<T>(first, col)), a.row_stride / Unit::elements};
  }
  const int64_t count = std::min(units * Unit::elements, a.cols - col);
  std::fill_n(copy, tile_rows * units, Word{0});
  for (int64_t i = 0; i < rows; ++i) {
    const T* from_row = a.at<T>(first + i, col);
    if constexpr (Unit::in_place) {
      T* row = reinterpret_cast<T*>(copy + i * units);
      for (int64_t c = 0; c < count; ++c) row[c] = from_row[c * a.col_stride];
    } else {
      float* row = reinterpret_cast<float*>(copy + i * units);
      for (int64_t c = 0; c < count; c += lanes) {
        const Vector values = load_row(from_row + c * a.col_stride, a.col_stride, count - c);
        count - c >= lanes ? store(row + c, values) : store(row + c, values, count - c);
      }
    }
  }
  return {copy, units};
}

// Stores the columns of a tile to a row; `cols` of them are left
template <class T>
void store_row(T* to, const Vector (&values)[tile_vectors], int64_t cols) {
  for (int64_t j = 0; j < tile_vectors && cols > j * lanes; ++j) {
    const int64_t count = cols - j * lanes;
    count >= lanes ? store(to + j * lanes, values[j]) : store(to + j * lanes, values[j], count);
  }
}

// out = left W' + offset for some rows and a panel of columns of out. pack(first unit, units, to) packs the panel of
// W'.
template <class Unit, class Pack>
void multiply_panel(const Matrix& left, const float* offset, const Matrix& out, const Pack& pack, Word* scratch) {
  using T = typename Unit::Element;
  const LinearScratch<Unit> sizes(left);
  Word *panel = scratch, *copy = panel + sizes.panel;
  for (int64_t from = 0; from < sizes.units; from += sizes.chunk) {
    const int64_t units = std::min(sizes.chunk, sizes.units - from);
    const bool last = from + units == sizes.units;
    pack(from, units, panel);
    for (int64_t row = 0; row < out.rows; row += tile_rows) {
      const Rows rows = left_rows<Unit>(left, row, from, units, copy);
      const int64_t row_count = std::min(tile_rows, out.rows - row), next = row + row_count,
                    first = from * Unit::elements;
      // Results, which are then written without a wait, and the next rows of the left operand. AVX2's product has no
      // room for many more instructions: it has the first lines of these rows prefetched, and the hardware continues.
      constexpr bool spread = lanes == 16;
      const int64_t ahead = spread ? std::min(units * Unit::elements, left.cols - first) : lanes;
      NearLines<T> out_lines(out.block(row, row_count, 0, out.cols));
      FarLines<T> left_lines(left.block(next, std::min(tile_rows, out.rows - next), first, ahead));
      const auto prefetch_line = [&] { return out_lines.prefetch() || left_lines.prefetch(); };
      while (!spread && prefetch_line()) continue;
      for (int64_t col = 0; col < out.cols; col += tile_cols) {
        const int64_t cols = out.cols - col;
        float* sums = reinterpret_cast<float*>(copy + sizes.rows) + row * panel_cols + col;
        int64_t sums_step = panel_cols;
        if constexpr (dtype_of<T> == Dtype::float32) sums = out.at<T>(row, col), sums_step = out.row_stride;
        Tile tile;
        for (int64_t i = 0; from > 0 && i < row_count; ++i) {
          for (int64_t j = 0; j < tile_vectors; ++j) {
            tile.sum[i][j] = load_row(sums + i * sums_step + j * lanes, 1, cols - j * lanes);
          }
        }
        add_product<Unit>(rows.data, rows.step, panel + col * units, units, from == 0, tile,
                          [&] { return spread && prefetch_line(); });
        for (int64_t i = 0; i < row_count; ++i) {
          if (!last) {
            store_row(sums + i * sums_step, tile.sum[i], cols);
            continue;
          }
          for (int64_t j = 0; offset != nullptr && j < tile_vectors; ++j) {
            tile.sum[i][j] = tile.sum[i][j] + load_row(offset + col + j * lanes, 1, cols - j * lanes);
          }
          store_row(out.at<T>(row + i, col), tile.sum[i], cols);
        }
      }
    }
  }
}

template <class Unit>
int64_t linear_scratch_bytes(const Matrix& left, const Layer& layer, int64_t threads) {
  const int64_t workers = useful_threads(left.rows * layer.n() * layer.k(), threads);
  return workers * LinearScratch<Unit>(left).words() * int64_t{sizeof(Word)};
}

// out = left W' + offset. pack(layer, first column, first unit, units, to) packs W'^T (forward) or W' (grad_input).
template <class Unit>
void multiply_by_rescaled(const Matrix& left, const float* offset, const Matrix& out,
                          void (*pack)(const Layer&, int64_t, int64_t, int64_t, Word*), const Layer& layer,
                          const Scratch& scratch) {
  const int64_t words = LinearScratch<Unit>(left).words(), workers = scratch.bytes / (words * int64_t{sizeof(Word)});
  const int64_t panels = up(out.cols, panel_cols), row_tiles = up(out.rows, tile_rows);
  // enough parts for all threads; each part forms W' again
  const int64_t row_parts =
      std::max(up(row_tiles, part_rows / tile_rows), std::clamp<int64_t>(up(2 * workers, panels), 1, up(row_tiles, 8)));
  const int64_t rows_of_part = up(row_tiles, row_parts) * tile_rows;
  share(panels * row_parts, workers, [&](int64_t task, int64_t worker) {
    const int64_t col = task % panels * panel_cols, row = task / panels * rows_of_part;
    if (row >= out.rows) return;
    [[maybe_unused]] const Multiplier held;
    const int64_t rows = std::min(rows_of_part, out.rows - row), cols = std::min(panel_cols, out.cols - col);
    multiply_panel<Unit>(
        left.block(row, rows, 0, left.cols), offset ? offset + col : nullptr, out.block(row, rows, col, cols),
        [&](int64_t from, int64_t units, Word* to) { pack(layer, col, from, units, to); },
        static_cast<Word*>(scratch.data) + worker * words);
  });
}

}  // namespace
}  // namespace rlrr
