// du and dv: G = dy^T x a tile at a time in registers, reduced against W at once.
//
// Sums over tokens are in float32 for bfloat16 too, where a BLAS would round G or take float32 copies.
#pragma once

#include "../runtime.h"
#include "pack.h"

namespace rlrr {
namespace {

// x as [column tile][unit][tile_cols], so that a tile of G reads it in one stream
template <class Unit>
void pack_x(const Matrix& x, int64_t col, int64_t tiles, int64_t units, Word* packed) {
  parallel_for(0, tiles * units, 128, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = col + i / units * tile_cols;
      for (int64_t j = 0; j < tile_cols; j += lanes) {
        _mm512_storeu_si512(packed + i * tile_cols + j, token_units<Unit>(x, i % units, first + j, x.cols));
      }
    }
  });
}

// dy of one task as [row tile][unit][tile_rows]
template <class Unit>
void pack_dy(const Matrix& dy, int64_t first, int64_t end, int64_t units, Word* packed) {
  static_assert(lanes == 2 * tile_rows);
  for (int64_t unit = 0; unit < units; ++unit) {
    for (int64_t j = 0; j < task_rows; j += lanes) {
      const __m512i both = token_units<Unit>(dy, unit, first + j, end);
      Word* tile = packed + j / tile_rows * units * tile_rows + unit * tile_rows;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile + units * tile_rows), _mm512_extracti64x4_epi64(both, 1));
    }
  }
}

// du += G W v over the tile's columns, dv += u G W over its rows. `whole`: the tile lies inside W, whose
// rows have no gaps.
template <class W, bool whole>
inline void reduce(const Tile& g, const Layer& layer, int64_t first, int64_t rows, int64_t col, const float* v,
                   float* du, float* dv) {
  const float* u = static_cast<const float*>(layer.u) + first;
  const __mmask16 all = 0xFFFF;
  __m512 scale_in[vectors], dv_sum[vectors];
#pragma GCC unroll 3
  for (int64_t j = 0; j < vectors; ++j) {
    const int64_t left = layer.k() - col - j * lanes;
    scale_in[j] = load_wide(v + col + (left > 0 ? j * lanes : 0), whole ? all : first_lanes(left));
    dv_sum[j] = _mm512_loadu_ps(dv + j * lanes);
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < tile_rows; ++i) {
    if (!whole && i >= rows) break;
    const __m512 scale_out = _mm512_set1_ps(u[i]);
    __m512 du_sum = _mm512_setzero_ps();
#pragma GCC unroll 3
    for (int64_t j = 0; j < vectors; ++j) {
      const int64_t k = col + j * lanes;
      __m512 w;
      if constexpr (whole) {
        w = load_wide(layer.weight.at<W>(first + i, k), all);
      } else {
        w = k < layer.k() ? load_row<W>(layer.weight, first + i, k, layer.k()) : _mm512_setzero_ps();
      }
      // an infinite dy makes NaN of the zeros that pad x
      const __m512 p = _mm512_maskz_mul_ps(whole ? all : first_lanes(layer.k() - k), g.sum[i][j], w);
      du_sum = _mm512_fmadd_ps(p, scale_in[j], du_sum);
      dv_sum[j] = _mm512_fmadd_ps(scale_out, p, dv_sum[j]);
    }
    du[i] += _mm512_reduce_add_ps(du_sum);
  }
#pragma GCC unroll 3
  for (int64_t j = 0; j < vectors; ++j) _mm512_storeu_ps(dv + j * lanes, dv_sum[j]);
}

// W's part under a tile of G: asked for before the product, it has arrived when the sums are done
template <class W>
void prefetch_weight(const Matrix& weight, int64_t first, int64_t rows, int64_t col) {
  if (weight.col_stride != 1) return;
  constexpr int64_t line = 64 / sizeof(W);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = col; k < std::min(col + tile_cols, weight.cols); k += line) {
      prefetch(weight.at<W>(first + i, k));
    }
  }
}

// Rows first...end of G, at most task_rows and of one group, over the columns that x is packed for
template <class Unit, class W>
void run_task(const Matrix& dy, const Layer& layer, int64_t first, int64_t end, int64_t col, int64_t tiles,
              int64_t units, const Word* packed_x, float* du, float* dv) {
  alignas(64) Word packed_dy[task_rows * max_units];
  pack_dy<Unit>(dy, first, end, units, packed_dy);
  std::fill_n(dv, tiles * tile_cols, 0.0f);
  const float* v = static_cast<const float*>(layer.v) + layer.group_of(first) * layer.k();
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t n = first; n < end; n += tile_rows) {
      const int64_t rows = std::min(tile_rows, end - n);
      prefetch_weight<W>(layer.weight, n, rows, col + t * tile_cols);
      Tile g;
      multiply<Unit>({packed_dy + (n - first) * units, 1, tile_rows}, packed_x + t * units * tile_cols, units, g);
      const bool whole = rows == tile_rows && col + (t + 1) * tile_cols <= layer.k() && layer.weight.col_stride == 1;
      (whole ? reduce<W, true> : reduce<W, false>)(g, layer, n, rows, col + t * tile_cols, v, du + n,
                                                   dv + t * tile_cols);
    }
  }
}

template <class Unit, class W>
void reduce_gram(const Matrix& dy, const Matrix& x, const Layer& layer, float* du, float* dv, void* scratch,
                 int64_t bytes) {
  const int64_t k = layer.k(), group_rows = layer.n() / layer.groups;
  const int64_t tasks = gram_tasks(layer), group_tasks = tasks / layer.groups;
  // blocks of tokens as long as one sum may be; du and dv are linear in G, so each is reduced at once
  const int64_t all_units = up(x.rows, Unit::elements), block_units = std::min(all_units, max_units);
  // as many columns of x as the scratch takes, with a partial dv for each task
  const int64_t fit = bytes / int64_t{sizeof(Word)} / (tile_cols * (block_units + tasks));
  const int64_t chunk_tiles = std::clamp<int64_t>(fit, 1, up(k, tile_cols));
  Word* packed_x = static_cast<Word*>(scratch);
  float* partial = reinterpret_cast<float*>(packed_x + chunk_tiles * block_units * tile_cols);

  for (int64_t first_unit = 0; first_unit < all_units; first_unit += block_units) {
    const int64_t units = std::min(block_units, all_units - first_unit), token = first_unit * Unit::elements;
    const int64_t tokens = std::min(units * Unit::elements, x.rows - token);
    const Matrix x_block = x.block(token, tokens, 0, k), dy_block = dy.block(token, tokens, 0, layer.n());
    for (int64_t col = 0; col < k; col += chunk_tiles * tile_cols) {
      const int64_t tiles = std::min(chunk_tiles, up(k - col, tile_cols)), width = tiles * tile_cols;
      pack_x<Unit>(x_block, col, tiles, units, packed_x);
      parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t group = task / group_tasks, first = group * group_rows + task % group_tasks * task_rows;
          run_task<Unit, W>(dy_block, layer, first, std::min(first + task_rows, (group + 1) * group_rows), col, tiles,
                            units, packed_x, du, partial + task * width);
        }
      });
      // in the order of the tasks, whichever thread ran them; added up first, then to what earlier blocks gave
      for (int64_t group = 0; group < layer.groups; ++group) {
        float* sum = partial + group * group_tasks * width;
        for (int64_t task = 1; task < group_tasks; ++task) {
          for (int64_t i = 0; i < width; ++i) sum[i] += sum[task * width + i];
        }
        for (int64_t i = 0; i < std::min(width, k - col); ++i) dv[group * k + col + i] += sum[i];
      }
    }
  }
}

}  // namespace
}  // namespace rlrr
