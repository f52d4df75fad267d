// du and dv of rank r > 1: as in gram.h, but a whole strip of P = G W lies in the scratch before it is reduced.
//
// A reduction costs 2 r multiply-adds for each element of G, so each element is reduced once: tiles of G are summed over
// all blocks of tokens first. G is divided into ranges of its rows, or of its columns, whose number depends on the
// layer and the tokens alone; each has its own sums of dv, or of du, which are added at the end.
#pragma once

#include <bit>

#include "gram.h"

namespace rlrr {
namespace {

// Columns of G whose part of du is summed at a time
constexpr int64_t slab_cols = up(64, tile_cols) * tile_cols;
// Rows of G that share a packed x if there are several blocks of tokens
constexpr int64_t region_rows = 384;
constexpr int64_t max_slabs = 384 / slab_cols;
static_assert(region_rows % strip_rows == 0 && strip_rows % 8 == 0);

// The ranges of G, and the sizes of the scratch
struct RankCells {
  int64_t group_rows, strips, slabs;  // strips of a group
  int64_t row_ranges, col_ranges;     // row_ranges of a group
  int64_t tasks, workers;
  int64_t block, width, height;  // units of a block of tokens; columns and strips of G that a thread holds
  int64_t padded_u, padded_v;    // the rank, up to whole blocks and vectors

  RankCells(const Matrix& x, const Layer& layer, int64_t token_units, int64_t threads) {
    const int64_t n = layer.n(), k = layer.k(), rank = layer.rank;
    group_rows = n / layer.groups;
    strips = up(group_rows, strip_rows);
    slabs = up(k, slab_cols);
    padded_u = up(rank, block_rows) * block_rows;
    padded_v = up(rank, lanes) * lanes;
    const int64_t blocks = up(token_units, max_block);
    block = up(token_units, blocks * unit_multiple) * unit_multiple;
    // Less than a tenth of what PyTorch holds for W * (u v), x (W * (u v))^T and their gradients
    const int64_t held = (2 * n * k + x.rows * n) * element_size(x.dtype);
    const int64_t budget = std::clamp<int64_t>(8 * held / 100, 64 << 10, 4 << 20);
    row_ranges = col_ranges = 1;
    if (group_rows >= k) {
      row_ranges = ranges(group_rows, budget / 2, sums_bytes(layer, 1, 0), 2);
      col_ranges = ranges(k, budget / 2 - sums_bytes(layer), sums_bytes(layer, 0, 1), 1);
    } else {
      col_ranges = ranges(k, budget / 2, sums_bytes(layer, 0, 1), 2);
      row_ranges = ranges(group_rows, budget / 2 - sums_bytes(layer), sums_bytes(layer, 1, 0), 1);
    }
    tasks = layer.groups * row_ranges * col_ranges;
    workers = std::min(useful_threads((x.rows + 2 * rank) * n * k, threads), tasks);
    width = std::min(max_slabs, up(slabs, col_ranges)) * slab_cols;
    height = blocks == 1 ? 1 : std::min(region_rows / strip_rows, up(strips, row_ranges));
    const int64_t words = (budget - sums_bytes(layer)) / workers / int64_t{sizeof(Word)};
    while (worker_words() > words && (width > slab_cols || height > 1)) {
      if (width > slab_cols && width >= height * strip_rows) {
        width -= slab_cols;
      } else {
        height = up(height, 2);
      }
    }
  }
  // The number of ranges of a side: of 384 rows or columns, or of 768 if there are more than four, and not more than
  // `bytes` suffice for, with `sums` for each but the first
  static int64_t ranges(int64_t length, int64_t bytes, int64_t sums, int64_t least) {
    const int64_t most = std::max(std::min<int64_t>(length / 384, 4), length / 768);
    const int64_t fit = std::max(bytes / sums + 1, least);
    return static_cast<int64_t>(
        std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(fit, 1, std::max<int64_t>(most, 1)))));
  }
  static int64_t sums_bytes(const Layer& layer, int64_t of_rows, int64_t of_cols) {
    return layer.rank * int64_t{sizeof(float)} * (of_rows * layer.groups * layer.k() + of_cols * layer.n());
  }
  int64_t sums_bytes(const Layer& layer) const { return sums_bytes(layer, row_ranges - 1, col_ranges - 1); }
  // blocks of x and dy, tiles of G, u of a strip and v
  int64_t worker_words() const {
    return width * (block + height * strip_rows + padded_v) + strip_rows * (block + padded_u);
  }
};

// Sums of tokens for a strip of G, in the worker's scratch: tiles side by side, each [height * strip_rows][tile_cols]
struct Strip {
  int64_t row, rows, col, cols;  // in G
  float* g;
  int64_t tile_step;
};

// Adds a tile to g, or writes it if it is the `first`; multiplies the sum by W if it is the `last`.
template <class W, bool whole>
inline void add_tile(const Tile& tile, const Matrix& weight, int64_t row, int64_t rows, int64_t col, bool first,
                     bool last, float* g) {
  const int64_t step = whole ? 1 : weight.col_stride;
  const W* w = weight.at<W>(row, col);
  for (int64_t i = 0; i < tile_rows; ++i, g += tile_cols, w += weight.row_stride) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < tile_vectors; ++j) {
      Vector value = tile.sum[i][j];
      if (!first) value = load(g + j * lanes) + value;
      if (last) {
        if constexpr (whole) {
          value = value * load(w + j * lanes);
        } else {
          // an infinite dy times the zeros that pad x is NaN
          const int64_t count = i < rows ? std::clamp<int64_t>(weight.cols - col - j * lanes, 0, lanes) : 0;
          value = keep(value * load_row(w + j * lanes * step, step, count), count);
        }
      }
      store(g + j * lanes, value);
    }
  }
}

// to[i] += values, `count` of them
inline void add_vector(float* to, Vector value, int64_t count) {
  if (count >= lanes) {
    store(to, load(to) + value);
  } else if (count > 0) {
    store(to, load(to, count) + value, count);
  }
}

// du [rows, rank] += P v of the slab from column `at` of the strip on, for `vectors` vectors of ranks
template <int64_t rows, int64_t vectors>
inline void add_scale_out(const Strip& strip, int64_t at, const float* v, int64_t padded, int64_t rank, int64_t first,
                          float* du) {
  const int64_t end = std::min(at + slab_cols, strip.cols);
  for (int64_t i = 0; i < strip.rows; i += rows) {
    Vector sum[rows][vectors];
    fill(sum, zero());
    for (int64_t c = at; c < end; c += tile_cols) {
      const float* p = strip.g + c / tile_cols * strip.tile_step + i * tile_cols;
      const float* from = v + c * padded + first;
      const auto right = [&](int64_t q, int64_t j) { return load(from + q * padded + j * lanes); };
      add_products<rows, vectors>(p, tile_cols, 1, tile_cols, right, sum);
    }
    for (int64_t r = 0; r < std::min(rows, strip.rows - i); ++r) {
      for (int64_t j = 0; j < vectors; ++j) {
        add_vector(du + (i + r) * rank + first + j * lanes, sum[r][j], rank - first - j * lanes);
      }
    }
  }
}

// Adds to du, whose first row is that of the strip, and to dv, whose first column is. `u` is [rows][padded_u], `v`
// [cols][padded_v].
inline void reduce_strip(const Strip& strip, const Layer& layer, const RankCells& cells, const float* u, const float* v,
                         float* du, float* dv) {
  const int64_t rank = layer.rank, k = layer.k();
  for (int64_t at = 0; at < strip.cols; at += slab_cols) {
    int64_t first = 0;
    for (; first + lanes < rank; first += 2 * lanes) {
      add_scale_out<block_rows, 2>(strip, at, v, cells.padded_v, rank, first, du);
    }
    if (first < rank) add_scale_out<8, 1>(strip, at, v, cells.padded_v, rank, first, du);
  }
  for (int64_t c = 0; c < strip.cols; c += tile_cols) {
    const float* p = strip.g + c / tile_cols * strip.tile_step;
    const auto right = [&](int64_t q, int64_t j) { return load(p + q * tile_cols + j * lanes); };
    for (int64_t first = 0; first < rank; first += block_rows) {
      Vector sum[block_rows][tile_vectors];
      fill(sum, zero());
      add_products<block_rows, tile_vectors>(u + first, 1, cells.padded_u, strip.rows, right, sum);
      for (int64_t r = 0; r < std::min(block_rows, rank - first); ++r) {
        for (int64_t j = 0; j < tile_vectors; ++j) {
          add_vector(dv + (first + r) * k + c + j * lanes, sum[r][j], strip.cols - c - j * lanes);
        }
      }
    }
  }
}

// Computes a strip of G for a packed block of tokens.
template <class Unit, class W>
void add_strip(const Strip& strip, const Layer& layer, int64_t units, const Word* packed_x, const Word* packed_dy,
               bool first, bool last) {
  for (int64_t at = 0; at < strip.cols; at += tile_cols) {
    for (int64_t i = 0; i < strip.rows; i += tile_rows) {
      const int64_t rows = std::min(tile_rows, strip.rows - i), row = strip.row + i, col = strip.col + at;
      const bool whole = rows == tile_rows && at + tile_cols <= strip.cols && layer.weight.col_stride == 1;
      NearLines<W> weight(layer.weight.block(row, whole && last ? rows : 0, col, tile_cols));
      Tile tile;
      multiply_strip<Unit>(packed_dy, i, packed_x + at * units, units, tile, [&] { weight.prefetch(); });
      (whole ? add_tile<W, true> : add_tile<W, false>)(tile, layer.weight, row, rows, col, first, last,
                                                       strip.g + at / tile_cols * strip.tile_step + i * tile_cols);
    }
  }
}

template <class Unit>
int64_t gram_rank_scratch_bytes(const Matrix& x, const Layer& layer, int64_t threads) {
  const RankCells cells(x, layer, up(x.rows, Unit::elements), threads);
  return cells.sums_bytes(layer) + cells.workers * cells.worker_words() * int64_t{sizeof(Word)};
}

// du [N, rank] and dv [groups, rank, K]
template <class Unit, class W>
void reduce_gram_rank(const Matrix& dy, const Matrix& x, const Layer& layer, float* du, float* dv,
                      const Scratch& scratch) {
  const int64_t n = layer.n(), k = layer.k(), rank = layer.rank, all_units = up(x.rows, Unit::elements);
  const RankCells cells(x, layer, all_units, scratch.threads);
  const int64_t du_size = n * rank, dv_size = layer.groups * rank * k;
  // the sums of the first ranges are the results, those of the others [ranges - 1, ...] are in the scratch
  float *du_sums = static_cast<float*>(scratch.data), *dv_sums = du_sums + (cells.col_ranges - 1) * du_size;
  Word* workers_scratch = reinterpret_cast<Word*>(dv_sums + (cells.row_ranges - 1) * dv_size);

  share(cells.tasks, cells.workers, [&](int64_t task, int64_t worker) {
    const int64_t col_range = task % cells.col_ranges, rest = task / cells.col_ranges;
    const int64_t row_range = rest % cells.row_ranges, group = rest / cells.row_ranges;
    const int64_t group_first = group * cells.group_rows, group_end = group_first + cells.group_rows;
    const int64_t top = group_first + row_range * cells.strips / cells.row_ranges * strip_rows;
    const int64_t bottom =
        std::min(group_first + (row_range + 1) * cells.strips / cells.row_ranges * strip_rows, group_end);
    const int64_t left = col_range * cells.slabs / cells.col_ranges * slab_cols;
    const int64_t right = std::min((col_range + 1) * cells.slabs / cells.col_ranges * slab_cols, k);
    float* du_range = col_range == 0 ? du : du_sums + (col_range - 1) * du_size;
    float* dv_range = (row_range == 0 ? dv : dv_sums + (row_range - 1) * dv_size) + group * rank * k;
    std::fill(du_range + top * rank, du_range + bottom * rank, 0.0f);
    for (int64_t j = 0; j < rank; ++j) std::fill(dv_range + j * k + left, dv_range + j * k + right, 0.0f);

    [[maybe_unused]] const Multiplier held;
    Word* packed_x = workers_scratch + worker * cells.worker_words();
    Word* packed_dy = packed_x + cells.block * cells.width;
    float* g = reinterpret_cast<float*>(packed_dy + cells.block * strip_rows);
    float* v = g + cells.height * strip_rows * cells.width;
    float* u = v + cells.width * cells.padded_v;
    std::fill_n(v, cells.width * cells.padded_v, 0.0f);
    std::fill_n(u, strip_rows * cells.padded_u, 0.0f);
    for (int64_t col = left; col < right; col += cells.width) {
      const int64_t cols = std::min(cells.width, right - col);
      for (int64_t j = 0; j < rank; ++j) {
        const float* from = static_cast<const float*>(layer.v) + (group * rank + j) * k + col;
        for (int64_t c = 0; c < cells.width; ++c) v[c * cells.padded_v + j] = c < cols ? from[c] : 0;
      }
      for (int64_t region = top; region < bottom; region += cells.height * strip_rows) {
        const int64_t region_end = std::min(region + cells.height * strip_rows, bottom);
        for (int64_t unit = 0; unit < all_units; unit += cells.block) {
          const int64_t token = unit * Unit::elements;
          const int64_t tokens = std::min(cells.block * Unit::elements, x.rows - token);
          const int64_t units = up(tokens, Unit::elements * unit_multiple) * unit_multiple;
          const bool last = unit + cells.block >= all_units;
          // of one block of tokens, x is the same for all regions
          if (cells.block < all_units || region == top) {
            pack_x<Unit>(x.block(token, tokens, 0, k), col, cols, units, packed_x);
          }
          for (int64_t row = region; row < region_end; row += strip_rows) {
            const int64_t rows = std::min(strip_rows, region_end - row);
            const Strip strip{
                row, rows, col, cols, g + (row - region) * tile_cols, cells.height * strip_rows * tile_cols};
            pack_dy<Unit>(dy.block(token, tokens, 0, n), row, row + rows, units, packed_dy);
            add_strip<Unit, W>(strip, layer, units, packed_x, packed_dy, unit == 0, last);
            if (!last) continue;
            const float* from = static_cast<const float*>(layer.u) + row * rank;
            for (int64_t i = 0; i < rows; ++i) std::copy_n(from + i * rank, rank, u + i * cells.padded_u);
            reduce_strip(strip, layer, cells, u, v, du_range + row * rank, dv_range + col);
          }
        }
      }
    }
  });

  for (int64_t range = 0; range < cells.col_ranges - 1; ++range) {
    for (int64_t i = 0; i < du_size; ++i) du[i] += du_sums[range * du_size + i];
  }
  for (int64_t range = 0; range < cells.row_ranges - 1; ++range) {
    for (int64_t i = 0; i < dv_size; ++i) dv[i] += dv_sums[range * dv_size + i];
  }
}

}  // namespace
}  // namespace rlrr
