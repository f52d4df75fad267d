// What scales of rank r > 1 need: products with the depth r, or with r rows or columns, in registers.
#pragma once

#include "multiply.h"

namespace rlrr {
namespace {

constexpr int64_t max_rank = 128;
// Rows of a block of sums of tile_vectors vectors: with AVX2 4 x 2, which leaves registers for the operands
constexpr int64_t block_rows = lanes == 8 ? 4 : 8;

// sum[i][j] += sum over p of left[i * row_step + p * step] * right(p, j)
template <int64_t rows, int64_t vectors, class Right>
inline __attribute__((always_inline)) void add_products(const float* left, int64_t row_step, int64_t step,
                                                        int64_t count, const Right& right,
                                                        Vector (&sum)[rows][vectors]) {
  constexpr int64_t half = (rows + 1) / 2;
  Vector part[rows][vectors];
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < vectors; ++j) part[i][j] = sum[i][j];
  }
  const float *near = left, *far = left + half * row_step;
  for (int64_t p = 0; p < count; ++p, near += step, far += step) {
    Vector cols[vectors];
#pragma GCC unroll 3
    for (int64_t j = 0; j < vectors; ++j) cols[j] = right(p, j);
#pragma GCC unroll 16
    for (int64_t i = 0; i < rows; ++i) {
      const Vector row = broadcast((i < half ? near : far)[i % half * row_step]);
#pragma GCC unroll 3
      for (int64_t j = 0; j < vectors; ++j) part[i][j] = multiply_add(row, cols[j], part[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < vectors; ++j) sum[i][j] = part[i][j];
  }
}

template <int64_t rows, int64_t vectors>
inline void fill(Vector (&sum)[rows][vectors], Vector value) {
  for (auto& row : sum) std::fill_n(row, vectors, value);
}

// Last, because a small term that is added to 1 loses digits
template <int64_t rows, int64_t vectors>
inline void add_one(Vector (&sum)[rows][vectors]) {
  for (auto& row : sum) {
    for (Vector& values : row) values = values + broadcast(1.0f);
  }
}

// u of `lanes` rows from `row` on as [rank][lanes]; 0 from row N on
inline void transpose_scale_out(const Layer& layer, int64_t row, float* to) {
  const float* u = static_cast<const float*>(layer.u) + row * layer.rank;
  const int64_t rows = std::min(lanes, layer.n() - row);
  for (int64_t j = 0; j < layer.rank; ++j) {
    for (int64_t i = 0; i < lanes; ++i) to[j * lanes + i] = i < rows ? u[i * layer.rank + j] : 0;
  }
}

// The scales of `lanes` rows from `row` on and `lanes` columns from `col` on. `u` is that of transpose_scale_out.
// `whole`: all rows are of one group, and no column is past K.
template <bool whole>
inline void scale_block(const Layer& layer, int64_t row, int64_t col, const float* u, Vector (&scale)[lanes][1]) {
  const int64_t k = layer.k(), rows = std::min(lanes, layer.n() - row);
  const auto v = [&](int64_t of_row) {
    return static_cast<const float*>(layer.v) + layer.group_of(of_row) * layer.rank * k + col;
  };
  fill(scale, broadcast(0.0f));
  if (whole || layer.group_of(row) == layer.group_of(row + rows - 1)) {
    const float* from = v(row);
    const auto right = [&](int64_t p, int64_t) {
      return whole ? load(from + p * k) : load_row(from + p * k, 1, k - col);
    };
    add_products<lanes, 1>(u, 1, lanes, layer.rank, right, scale);
    add_one(scale);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = v(row + i);
    Vector one[1][1] = {{scale[i][0]}};
    add_products<1, 1>(
        u + i, 1, lanes, layer.rank, [&](int64_t p, int64_t) { return load_row(from + p * k, 1, k - col); }, one);
    scale[i][0] = one[0][0];
  }
  add_one(scale);
}

// In the place of ScaleRows for rank 1
struct NoScales {
  NoScales(const Layer&, int64_t, int64_t) {}
};

// The scales of a panel of columns of W, a few rows at a time.
template <int64_t panel_cols>
class ScaleRows {
 public:
  // Takes `count` vectors of columns from `first` on
  ScaleRows(const Layer& layer, int64_t first, int64_t count) : layer_(layer), first_(first), count_(count) {}

  // The scales of a row, which must not decrease from call to call
  const float* operator()(int64_t row) {
    if (row >= end_) compute(row);
    return scales_ + (row - begin_) * panel_cols;
  }

 private:
  const Layer& layer_;
  int64_t first_, count_;
  int64_t begin_ = 0, end_ = 0, group_end_ = 0;
  float v_[max_rank * panel_cols];         // of the group of the last row
  float scales_[block_rows * panel_cols];  // of rows [begin_, end_)

  void load_group(int64_t row) {
    const int64_t k = layer_.k(), group = layer_.group_of(row);
    group_end_ = (group + 1) * (layer_.n() / layer_.groups);
    const float* v = static_cast<const float*>(layer_.v) + group * layer_.rank * k;
    for (int64_t p = 0; p < layer_.rank; ++p, v += k) {
      for (int64_t j = 0; j < count_; ++j) {
        const int64_t col = first_ + j * lanes;
        store(v_ + p * panel_cols + j * lanes, load_row(v + col, 1, k - col));
      }
    }
  }

  void compute(int64_t row) {
    if (row >= group_end_) load_group(row);
    begin_ = row;
    end_ = row + block_rows <= group_end_ ? row + block_rows : row + 1;
    end_ - begin_ == block_rows ? compute<block_rows>() : compute<1>();
  }

  template <int64_t rows>
  void compute() {
    const int64_t rank = layer_.rank;
    const float* u = static_cast<const float*>(layer_.u) + begin_ * rank;
    for (int64_t at = 0; at < count_; at += tile_vectors) {
      Vector sum[rows][tile_vectors];
      fill(sum, broadcast(0.0f));
      const auto right = [&](int64_t p, int64_t j) { return load(v_ + p * panel_cols + (at + j) * lanes); };
      add_products<rows, tile_vectors>(u, rank, 1, rank, right, sum);
      add_one(sum);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < tile_vectors; ++j) store(scales_ + i * panel_cols + (at + j) * lanes, sum[i][j]);
      }
    }
  }
};

}  // namespace
}  // namespace rlrr
