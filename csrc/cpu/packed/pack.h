// Operands in the order in which the product reads them. W is rescaled as it is packed.
#pragma once

#include "rank.h"

namespace rlrr {
namespace {

// The columns of W' that a thread forms at a time: tiles side by side, each [units][tile_cols]
constexpr int64_t panel_cols = panel_tiles * tile_cols, panel_vectors = panel_cols / lanes;

// w (1 + u v) in float32. Each step is rounded as in the formula, without fused multiply-adds.
inline Vector rescale(Vector w, Vector u, Vector v) { return w * (broadcast(1.0f) + u * v); }

// Rows are pages apart, and more of them are read at once than the hardware prefetches
inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

// The lines of a matrix that is read soon, if its columns are adjacent; else of no use. A product prefetches one of them
// every few steps: a burst would fill the line buffers of the core, and the loads of the product would wait for it.
template <class T, int locality>
class Lines {
 public:
  explicit Lines(const Matrix& a)
      : row_(reinterpret_cast<const char*>(a.at<T>(0, 0))),
        row_bytes_(a.row_stride * int64_t{sizeof(T)}),
        bytes_(a.cols * int64_t{sizeof(T)}),
        rows_(a.cols > 0 ? a.rows : 0) {}

  // Prefetches the next line; false if all have been
  bool prefetch() {
    if (rows_ == 0) return false;
    __builtin_prefetch(row_ + done_, 0, locality);
    done_ += 64;
    if (done_ >= bytes_) done_ = 0, row_ += row_bytes_, --rows_;
    return true;
  }

 private:
  const char* row_;
  int64_t row_bytes_, bytes_, rows_, done_ = 0;
};

// Into the L1 cache
template <class T>
using NearLines = Lines<T, 3>;
// Into the L2 cache
template <class T>
using FarLines = Lines<T, 2>;

// `lanes` rows of W' from `row` on and `lanes` units from `col` on, a vector for each row. `whole`: the block lies
// inside W and one group, and its columns are adjacent, so that no element has to be checked. `u`: of these rows; for
// `ranked` layers, those of rank 2 and more, that of transpose_scale_out.
template <class Unit, class W, bool whole, bool ranked>
void rescale_block(const Layer& layer, int64_t row, int64_t col, const float* u, Vector (&block)[lanes]) {
  const int64_t n = layer.n(), k = layer.k();
  const float* v = static_cast<const float*>(layer.v) + col;
  Vector scale_in[Unit::elements], scales[Unit::elements][lanes][1];
  if constexpr (ranked) {
    for (int64_t e = 0; e < Unit::elements; ++e) scale_block<whole>(layer, row, col + e * lanes, u, scales[e]);
  } else if constexpr (whole) {
    for (int64_t e = 0; e < Unit::elements; ++e) scale_in[e] = load(v + layer.group_of(row) * k + e * lanes);
  }
  const W* w = layer.weight.at<W>(row, col);
#pragma GCC unroll 16
  for (int64_t i = 0; i < lanes; ++i, w += layer.weight.row_stride) {
    Vector parts[Unit::elements];
    if (whole) prefetch(w + 128);
    for (int64_t e = 0; e < Unit::elements; ++e) {
      const int64_t left = k - col - e * lanes;
      if constexpr (whole) {
        const Vector values = load(w + e * lanes);
        parts[e] = Unit::round(ranked ? values * scales[e][i][0] : rescale(values, broadcast(u[i]), scale_in[e]));
      } else if (row + i < n && left > 0) {
        const int64_t count = std::min(left, lanes), step = layer.weight.col_stride;
        Vector scaled = load_row(w + e * lanes * step, step, count);
        if constexpr (ranked) {
          scaled = scaled * scales[e][i][0];
        } else {
          const Vector scale = load_row(v + layer.group_of(row + i) * k + e * lanes, 1, count);
          scaled = rescale(scaled, broadcast(u[i]), scale);
        }
        parts[e] = keep(Unit::round(scaled), count);  // an infinite u would make the padding NaN
      } else {
        parts[e] = zero();
      }
    }
    block[i] = Unit::along(parts);
  }
}

// Packs rows of W' from `first` on as columns of a sum over K, `units` of it from unit `from` on. Rows past N are 0.
template <class Unit, class W, bool ranked>
void pack_rescaled_rows(const Layer& layer, int64_t first, int64_t from, int64_t units, Word* packed) {
  const int64_t n = layer.n(), k = layer.k();
  for (int64_t col = 0; col < up(std::min(panel_cols, n - first), tile_cols) * tile_cols; col += lanes) {
    const int64_t row = first + col;
    const bool whole =
        layer.weight.col_stride == 1 && row + lanes <= n && layer.group_of(row) == layer.group_of(row + lanes - 1);
    const float* u = static_cast<const float*>(layer.u) + row;
    float transposed[ranked ? max_rank * lanes : 1];
    if constexpr (ranked) {
      transpose_scale_out(layer, row, transposed);
      u = transposed;
    }
    for (int64_t unit = 0; unit < units; unit += lanes) {
      Vector block[lanes];
      const int64_t at = (from + unit) * Unit::elements;
      if (whole && at + lanes * Unit::elements <= k) {
        rescale_block<Unit, W, true, ranked>(layer, row, at, u, block);
      } else {
        rescale_block<Unit, W, false, ranked>(layer, row, at, u, block);
      }
      transpose(block);
      Word* to = packed + (col / tile_cols * units + unit) * tile_cols + col % tile_cols;
      for (int64_t i = 0; i < std::min(lanes, units - unit); ++i) store(to + i * tile_cols, block[i]);
    }
  }
}

// As pack_rescaled_cols. `whole`: all columns of the panel lie inside W and are adjacent.
template <class Unit, class W, bool ranked, bool whole>
void pack_cols(const Layer& layer, int64_t first, int64_t from, int64_t units, Word* packed) {
  const int64_t n = layer.n(), k = layer.k(), group_rows = n / layer.groups, step = whole ? 1 : layer.weight.col_stride;
  const float *u = static_cast<const float*>(layer.u), *v = static_cast<const float*>(layer.v) + first;
  const int64_t count = whole ? panel_vectors : up(std::min(panel_cols, k - first), tile_cols) * tile_vectors;
  const auto row_of = [&](const auto* row, int64_t row_step, int64_t j) {
    return whole ? load(row + j * lanes) : load_row(row + j * lanes * row_step, row_step, k - first - j * lanes);
  };
  [[maybe_unused]] std::conditional_t<ranked, ScaleRows<panel_cols>, NoScales> scales(layer, first, count);
  Vector scale_in[panel_vectors];
  int64_t group_end = 0;  // of the group of scale_in: a division for each row would take as long as its W'
  for (int64_t unit = 0; unit < units; ++unit, packed += tile_cols) {
    Vector rows[panel_vectors][Unit::elements];
    for (int64_t e = 0; e < Unit::elements; ++e) {
      const int64_t row = (from + unit) * Unit::elements + e;
      if (row >= n) {
        for (int64_t j = 0; j < count; ++j) rows[j][e] = zero();
        continue;
      }
      if (!ranked && row >= group_end) {
        const int64_t group = layer.group_of(row);
        group_end = (group + 1) * group_rows;
        for (int64_t j = 0; j < count; ++j) scale_in[j] = row_of(v + group * k, 1, j);
      }
      const W* w = layer.weight.at<W>(row, first);
      if constexpr (ranked) {
        const float* scale = scales(row);
        for (int64_t j = 0; j < count; ++j) {
          prefetch(w + 16 * layer.weight.row_stride + j * lanes * step);
          rows[j][e] = Unit::round(row_of(w, step, j) * load(scale + j * lanes));
        }
        continue;
      }
      const Vector scale_out = broadcast(u[row]);
      for (int64_t j = 0; j < count; ++j) {
        prefetch(w + 16 * layer.weight.row_stride + j * lanes * step);
        rows[j][e] = Unit::round(rescale(row_of(w, step, j), scale_out, scale_in[j]));
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      store(packed + j / tile_vectors * units * tile_cols + j % tile_vectors * lanes, Unit::across(rows[j]));
    }
  }
}

// Packs columns of W' from `first` on as columns of a sum over N, `units` of it from unit `from` on. Columns past K are
// 0.
template <class Unit, class W, bool ranked>
void pack_rescaled_cols(const Layer& layer, int64_t first, int64_t from, int64_t units, Word* packed) {
  const bool whole = first + panel_cols <= layer.k() && layer.weight.col_stride == 1;
  (whole ? pack_cols<Unit, W, ranked, true> : pack_cols<Unit, W, ranked, false>)(layer, first, from, units, packed);
}

// `lanes` columns of x or dy as units of a sum over tokens; 0 from column `end` on
template <class Unit>
inline __attribute__((always_inline)) Vector token_units(const Matrix& a, int64_t unit, int64_t col, int64_t end) {
  using T = typename Unit::Element;
  if constexpr (Unit::elements == 2) {
    if (a.col_stride == 1) {
      const auto row = [&](int64_t token) {
        prefetch(a.at<T>(token + 16, col));
        return token < a.rows ? a.at<T>(token, col) : nullptr;
      };
      return Unit::pairs(row(2 * unit), row(2 * unit + 1), std::clamp<int64_t>(end - col, 0, lanes));
    }
  }
  Vector rows[Unit::elements];
  for (int64_t e = 0; e < Unit::elements; ++e) {
    const int64_t token = unit * Unit::elements + e;
    prefetch(a.at<T>(token + 16, col));
    rows[e] = token < a.rows ? load_row(a.at<T>(token, col), a.col_stride, end - col) : zero();
  }
  return Unit::across(rows);
}

}  // namespace
}  // namespace rlrr
