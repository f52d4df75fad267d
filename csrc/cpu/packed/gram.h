// du and dv: G = dy^T x is computed a tile at a time in registers, and reduced against W at once.
//
// G is divided into cells of rows of one group by columns, whose sizes depend on the layer alone. A thread packs the
// part of x of a cell in a scratch of its own, and computes a few cells one below the other for a block of tokens; then
// those beside them, while their part of dy is in the L2 cache. Each cell has its own partial sums of du and dv, which
// are added at the end in an order that does not depend on the threads. Sums over tokens are in float32 for bfloat16
// too; a BLAS would round G, or need float32 copies.
#pragma once

#include "../runtime.h"
#include "pack.h"

namespace rlrr {
namespace {

// Rows of G that share a packed dy, which fits in the L1 cache for a block of tokens
constexpr int64_t strip_rows = strip_tiles * tile_rows;
// Rows and columns of a cell: whole strips, and whole tiles
constexpr int64_t cell_rows = 192, cell_cols = 160 / tile_cols * tile_cols;
// Cells one below the other whose part of dy stays in the L2 cache
constexpr int64_t max_height = 4;
// Cells side by side whose part of x stays there too
constexpr int64_t max_panel = 3;
// Units of a block of tokens. For a layer of 768 x 768 the scratch of two threads is then less than a twentieth of what
// the formula holds.
constexpr int64_t max_block = 200 / unit_multiple * unit_multiple;
static_assert(cell_rows % strip_rows == 0 && cell_cols % tile_cols == 0 && strip_rows % lanes == 0);

// The cells of a layer, and the sizes of the scratch
struct Cells {
  int64_t group_rows, rows_of_group, rows, cols;
  int64_t workers, block, panel;  // threads, units of a block of tokens, cells side by side whose x is packed at once

  Cells(const Layer& layer, int64_t tokens, int64_t token_units, int64_t threads) {
    group_rows = layer.n() / layer.groups;
    rows_of_group = up(group_rows, cell_rows);
    rows = layer.groups * rows_of_group;
    cols = up(layer.k(), cell_cols);
    workers = useful_threads(tokens * layer.n() * layer.k(), threads);
    block = up(token_units, up(token_units, max_block) * unit_multiple) * unit_multiple;
    // 1/25 of the three float32 copies of W that the formula holds, within what fits in a cache
    const int64_t budget = std::clamp<int64_t>(12 * layer.n() * layer.k() / 25, 64 << 10, 2 << 20) - sums_bytes(layer);
    panel = std::clamp<int64_t>(budget / workers / int64_t{sizeof(Word)} / (block * cell_cols), 1,
                                std::min(cols, max_panel));
  }
  int64_t sums_bytes(const Layer& layer) const {
    return (cols * layer.n() + rows * layer.k()) * int64_t{sizeof(double)};
  }
  // a block of x for a panel, and a strip of dy
  int64_t worker_words() const { return block * (panel * cell_cols + strip_rows); }
};

// Packs `cols` columns of x from `col` on as [tile][unit][tile_cols], so that a tile of G reads them in order
template <class Unit>
void pack_x(const Matrix& x, int64_t col, int64_t cols, int64_t units, Word* packed) {
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t j = 0; j < up(cols, tile_cols) * tile_cols; j += lanes) {
      Word* to = packed + (j / tile_cols * units + unit) * tile_cols + j % tile_cols;
      store(to, token_units<Unit>(x, unit, col + j, x.cols));
    }
  }
}

// Packs a strip of dy as multiply_strip reads it
template <class Unit>
void pack_dy(const Matrix& dy, int64_t first, int64_t end, int64_t units, Word* packed) {
  if constexpr (unit_multiple == lanes) {
    for (int64_t unit = 0; unit < units; unit += lanes) {
      for (int64_t j = 0; j < strip_rows; j += lanes) {
        Vector block[lanes];
        for (int64_t i = 0; i < lanes; ++i) block[i] = token_units<Unit>(dy, unit + i, first + j, end);
        transpose(block);
        for (int64_t i = 0; i < lanes; ++i) store(packed + (j + i) * units + unit, block[i]);
      }
    }
    return;
  }
  for (int64_t unit = 0; unit < units; ++unit, packed += strip_rows) {
    for (int64_t j = 0; j < strip_rows; j += lanes) store(packed + j, token_units<Unit>(dy, unit, first + j, end));
  }
}

// du += G W v over the columns of the tile, lane by lane, and dv += u G W over its rows. `whole`: the tile lies inside
// W, whose columns are adjacent.
template <class W, bool whole>
inline void reduce(const Tile& g, const Layer& layer, int64_t first, int64_t rows, int64_t col, const float* v,
                   Vector* du, float* dv) {
  const float* u = static_cast<const float*>(layer.u) + first;
  const int64_t step = whole ? 1 : layer.weight.col_stride;
  const W* w = layer.weight.at<W>(first, col);
  Vector scale_in[tile_vectors], dv_sum[tile_vectors];
#pragma GCC unroll 3
  for (int64_t j = 0; j < tile_vectors; ++j) {
    const int64_t k = col + j * lanes;
    scale_in[j] = whole ? load(v + k) : load_row(v + k, 1, layer.k() - k);
    dv_sum[j] = load(dv + j * lanes);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < tile_rows; ++i, w += layer.weight.row_stride) {
    if (!whole && i >= rows) break;
    const Vector scale_out = broadcast(u[i]);
    Vector du_sum = du[i];
#pragma GCC unroll 3
    for (int64_t j = 0; j < tile_vectors; ++j) {
      Vector p;
      if constexpr (whole) {
        p = g.sum[i][j] * load(w + j * lanes);
      } else {
        // an infinite dy times the zeros that pad x is NaN
        const int64_t count = std::clamp<int64_t>(layer.k() - col - j * lanes, 0, lanes);
        p = keep(g.sum[i][j] * load_row(w + j * lanes * step, step, count), count);
      }
      du_sum = multiply_add(p, scale_in[j], du_sum);
      dv_sum[j] = multiply_add(scale_out, p, dv_sum[j]);
    }
    du[i] = du_sum;
  }
#pragma GCC unroll 3
  for (int64_t j = 0; j < tile_vectors; ++j) store(dv + j * lanes, dv_sum[j]);
}

// Computes rows [first, end) of G, at most a strip, in columns [col, col + cols) of a cell for a packed block of
// tokens, and adds to du [end - first] and dv [cols]. Within a block sums are in float32, across blocks in float64.
// Prefetches W, and with the time that is left what is packed next.
template <class Unit, class W, class Next>
void run_strip(const Layer& layer, int64_t first, int64_t end, int64_t col, int64_t cols, int64_t units,
               const Word* packed_x, const Word* packed_dy, Next& next_x, Next& next_dy, double* du, double* dv) {
  Vector du_part[strip_rows];
  std::fill_n(du_part, strip_rows, zero());
  float dv_part[cell_cols] = {};
  const float* v = static_cast<const float*>(layer.v) + layer.group_of(first) * layer.k();
  for (int64_t at = 0; at < cols; at += tile_cols) {
    for (int64_t row = first; row < end; row += tile_rows) {
      const int64_t rows = std::min(tile_rows, end - row);
      const bool whole = rows == tile_rows && at + tile_cols <= cols && layer.weight.col_stride == 1;
      NearLines<W> weight(layer.weight.block(row, whole ? rows : 0, col + at, tile_cols));
      Tile g;
      multiply_strip<Unit>(packed_dy, row - first, packed_x + at * units, units, g,
                           [&] { weight.prefetch() || next_dy.prefetch() || next_x.prefetch(); });
      (whole ? reduce<W, true> : reduce<W, false>)(g, layer, row, rows, col + at, v, du_part + (row - first),
                                                   dv_part + at);
    }
  }
  for (int64_t i = 0; i < end - first; ++i) du[i] += sum(du_part[i]);
  for (int64_t i = 0; i < cols; ++i) dv[i] += dv_part[i];
}

template <class Unit>
int64_t gram_scratch_bytes(const Matrix& x, const Layer& layer, int64_t threads) {
  const Cells cells(layer, x.rows, up(x.rows, Unit::elements), threads);
  return cells.sums_bytes(layer) + cells.workers * cells.worker_words() * int64_t{sizeof(Word)};
}

// du [N] and dv [groups, K]
template <class Unit, class W>
void reduce_gram(const Matrix& dy, const Matrix& x, const Layer& layer, float* du, float* dv, const Scratch& scratch) {
  using Next = FarLines<typename Unit::Element>;
  const int64_t n = layer.n(), k = layer.k(), all_units = up(x.rows, Unit::elements);
  const Cells cells(layer, x.rows, all_units, scratch.threads);
  // [cells.cols, N] and [cells.rows, K]
  double *du_cells = static_cast<double*>(scratch.data), *dv_cells = du_cells + cells.cols * n;
  Word* workers_scratch = reinterpret_cast<Word*>(dv_cells + cells.rows * k);
  std::memset(scratch.data, 0, static_cast<size_t>(cells.sums_bytes(layer)));

  // Two tasks for each thread. The cells of a task in one column share a packed x: two of them at least, if W has two.
  const int64_t wanted = cells.workers == 1 ? 1 : 2 * cells.workers;
  const int64_t height = std::clamp<int64_t>(cells.rows / wanted, std::min<int64_t>(cells.rows, 2), max_height);
  const int64_t tasks_down = up(cells.rows, height);
  const int64_t tasks_across = std::clamp<int64_t>(up(wanted, tasks_down), 1, cells.cols);
  const int64_t block_tokens = cells.block * Unit::elements, panel_width = cells.panel * cell_cols;
  share(tasks_down * tasks_across, cells.workers, [&](int64_t task, int64_t worker) {
    const int64_t top = task / tasks_across * height, bottom = std::min(top + height, cells.rows);
    const int64_t across = task % tasks_across, left = across * cells.cols / tasks_across * cell_cols;
    const int64_t right = std::min((across + 1) * cells.cols / tasks_across * cell_cols, k);
    const auto first_row = [&](int64_t cell_row) {
      return cell_row / cells.rows_of_group * cells.group_rows + cell_row % cells.rows_of_group * cell_rows;
    };
    // the part of x or dy in a block of tokens
    const auto block_of = [&](const Matrix& a, int64_t token, int64_t col, int64_t cols) {
      return a.block(token, std::clamp<int64_t>(x.rows - token, 0, block_tokens), col, cols);
    };
    [[maybe_unused]] const Multiplier held;
    Word* packed_x = workers_scratch + worker * cells.worker_words();
    Word* packed_dy = packed_x + cells.block * panel_width;
    for (int64_t token = 0; token < x.rows; token += block_tokens) {
      const Matrix x_block = block_of(x, token, 0, k), dy_block = block_of(dy, token, 0, n);
      const int64_t units = up(x_block.rows, Unit::elements * unit_multiple) * unit_multiple;
      for (int64_t col = left; col < right; col += panel_width) {
        const int64_t end_col = std::min(col + panel_width, right);
        pack_x<Unit>(x_block, col, end_col - col, units, packed_x);
        // of the next panel, or of the first one in the next block
        const bool last = end_col == right;
        const int64_t next_token = last ? token + block_tokens : token, next_col = last ? left : end_col;
        Next next_x(block_of(x, next_token, next_col, std::min(panel_width, right - next_col)));
        for (int64_t cell_row = top; cell_row < bottom; ++cell_row) {
          const int64_t group_end = (cell_row / cells.rows_of_group + 1) * cells.group_rows;
          const int64_t end_row = std::min(first_row(cell_row) + cell_rows, group_end);
          for (int64_t row = first_row(cell_row); row < end_row; row += strip_rows) {
            const int64_t end = std::min(row + strip_rows, end_row);
            pack_dy<Unit>(dy_block, row, end, units, packed_dy);
            const bool wraps = end == end_row && cell_row + 1 == bottom;
            const int64_t next_row = wraps ? first_row(top) : end;
            Next next_dy(block_of(dy, wraps ? next_token : token, next_row, std::min(strip_rows, n - next_row)));
            for (int64_t at = col; at < end_col; at += cell_cols) {
              run_strip<Unit, W>(layer, row, end, at, std::min(cell_cols, end_col - at), units,
                                 packed_x + (at - col) * units, packed_dy, next_x, next_dy,
                                 du_cells + at / cell_cols * n + row, dv_cells + cell_row * k + at);
            }
          }
        }
      }
    }
  });

  for (int64_t i = 0; i < n; ++i) {
    double total = 0;
    for (int64_t cell = 0; cell < cells.cols; ++cell) total += du_cells[cell * n + i];
    du[i] = static_cast<float>(total);
  }
  for (int64_t group = 0; group < layer.groups; ++group) {
    const double* of_group = dv_cells + group * cells.rows_of_group * k;
    for (int64_t i = 0; i < k; ++i) {
      double total = 0;
      for (int64_t cell = 0; cell < cells.rows_of_group; ++cell) total += of_group[cell * k + i];
      dv[group * k + i] = static_cast<float>(total);
    }
  }
}

}  // namespace
}  // namespace rlrr
