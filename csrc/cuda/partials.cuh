// The partial sums of grad_scales: how many fit the workspace, where they lie, and the kernel that adds them.
//
// Each tile of G leaves a row of partial sums of du and one of dv, so that the sums of all tiles grow with N * K. To
// bound the workspace, W is cut into slices of tiles, and one launch after another computes a slice. 1.9 MB of sums
// belong to 300 (if W is one tile wide) to 3700 tiles, as many as a GPU works on at once or more. The layers of vision
// transformers are one slice.
#pragma once

#include "machine.cuh"

namespace rlrr {

// The most bytes of partial sums; it also limits the number of splits of the tokens.
constexpr int64_t kWorkspaceBytes = 1'900'000;

// A slice of W: column tiles [col_tile, col_tile + col_tiles) of row tiles [tile, tile + tiles) of each of the groups
// [group, group + groups). If there are several groups, they are whole, so that the rows of the slice are contiguous in
// W, du and dv.
struct Slice {
  int64_t group, groups, tile, tiles, col_tile, col_tiles;
  int64_t tile_rows, tile_cols, group_rows, k;

  int64_t first_row() const { return group * group_rows + tile * tile_rows; }
  int64_t rows() const {
    return groups > 1 ? groups * group_rows : least(tiles * tile_rows, group_rows - tile * tile_rows);
  }
  int64_t first_col() const { return col_tile * tile_cols; }
  int64_t cols() const { return least(col_tiles * tile_cols, k - first_col()); }
  // Partial sums of one split, with `df_rows` rows for df.
  int64_t floats(int64_t df_rows) const { return (col_tiles + df_rows) * rows() + groups * tiles * cols(); }

  static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Cuts W into slices.
class Slices {
 public:
  Slices(const Layer& layer, int64_t tile_rows, int64_t tile_cols, int64_t df_rows) : df_rows_(df_rows) {
    const int64_t group_rows = layer.n / layer.groups;
    all_ = {0,         layer.groups, 0,      up(group_rows, tile_rows), 0, up(layer.k, tile_cols), tile_rows,
            tile_cols, group_rows,   layer.k};
    step_ = all_;
    const int64_t most = kWorkspaceBytes / 4;
    if (all_.floats(df_rows) <= most) return;
    // whole rows of tiles if they fit, and then as many rows as fit
    step_.col_tiles = even(all_.col_tiles, (most - df_rows * tile_rows) / (tile_rows + tile_cols));
    const int64_t tiles = most / ((step_.col_tiles + df_rows) * tile_rows + step_.col_tiles * tile_cols);
    step_.tiles = even(all_.tiles, tiles);
    const bool whole_groups = step_.tiles == all_.tiles && step_.col_tiles == all_.col_tiles;
    step_.groups = whole_groups ? even(all_.groups, tiles / all_.tiles) : 1;
  }

  bool one() const {
    return step_.groups == all_.groups && step_.tiles == all_.tiles && step_.col_tiles == all_.col_tiles;
  }
  // Partial sums of the largest slice.
  int64_t floats() const { return step_.floats(df_rows_); }

  // Calls run(slice) for each slice, in a fixed order, until one returns an error.
  template <class Run>
  cudaError_t each(const Run& run) const {
    Slice s = step_;
    for (s.group = 0; s.group < all_.groups; s.group += step_.groups)
      for (s.tile = 0; s.tile < all_.tiles; s.tile += step_.tiles)
        for (s.col_tile = 0; s.col_tile < all_.col_tiles; s.col_tile += step_.col_tiles) {
          s.groups = Slice::least(step_.groups, all_.groups - s.group);
          s.tiles = Slice::least(step_.tiles, all_.tiles - s.tile);
          s.col_tiles = Slice::least(step_.col_tiles, all_.col_tiles - s.col_tile);
          const cudaError_t error = run(s);
          if (error != cudaSuccess) return error;
        }
    return cudaSuccess;
  }

 private:
  static constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  // The size of equal parts of at most `most`.
  static constexpr int64_t even(int64_t count, int64_t most) { return up(count, up(count, most)); }

  Slice all_, step_;
  int64_t df_rows_;
};

// The partial sums of a slice, in one workspace: du [du_rows, n], dv [groups, dv_rows, k], df [df_rows, n].
struct Partials {
  float *du_rows_data, *dv_rows_data, *df_rows_data;
  float *du, *dv, *df;  // the first results of the slice; df is null if it is not wanted
  int64_t n, k;         // of the slice
  int groups, du_rows, dv_rows, df_rows;
  bool more_of_du, more_of_dv;  // whether to add to what earlier slices stored there
};

// `df_rows`: rows of partial sums of df for each split. Of the slices with the same rows of W the first computes df.
inline Partials partials_of(const GradScales& g, const Slice& s, int64_t splits, int64_t df_rows) {
  Partials p;
  p.n = s.rows(), p.k = s.cols();
  p.groups = static_cast<int>(s.groups);
  p.du_rows = static_cast<int>(splits * s.col_tiles);
  p.dv_rows = static_cast<int>(splits * s.tiles);
  p.df_rows = static_cast<int>(splits * df_rows);
  p.du_rows_data = g.workspace;
  p.dv_rows_data = p.du_rows_data + p.du_rows * p.n;
  p.df_rows_data = p.dv_rows_data + p.groups * p.dv_rows * p.k;
  p.du = g.du + s.first_row();
  p.dv = g.dv + s.group * g.layer.k + s.first_col();
  p.df = g.df && s.col_tile == 0 ? g.df + s.first_row() : nullptr;
  p.more_of_du = s.col_tile > 0;
  p.more_of_dv = s.tile > 0;
  return p;
}

// Sums a column. Eight running sums keep as many loads in flight, and round less than one would.
RLRR_DEVICE float sum_column(const float* from, int rows, int64_t stride) {
  constexpr int kSums = 8;
  float sums[kSums] = {};
  for (int row = 0; row < rows; row += kSums) {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      if (row + i < rows) sums[i] += ptx::load(from + (row + i) * stride);
  }
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

RLRR_DEVICE void finish_column(float* to, float sum, bool more) { ptx::store(to, more ? ptx::load(to) + sum : sum); }

// Each thread sums a column: of du, then of dv of each group, then of df. Static, since two source files include it.
static RLRR_KERNEL(2) sum_partials_kernel(RLRR_PARAMETER Partials p) {
  int64_t column = static_cast<int64_t>(ptx::block()) * kThreads + ptx::thread();
  if (column < p.n)
    return finish_column(p.du + column, sum_column(p.du_rows_data + column, p.du_rows, p.n), p.more_of_du);
  column -= p.n;
  if (column < p.groups * p.k) {
    const float* rows = p.dv_rows_data + column / p.k * p.dv_rows * p.k;
    return finish_column(p.dv + column, sum_column(rows + column % p.k, p.dv_rows, p.k), p.more_of_dv);
  }
  column -= p.groups * p.k;
  if (p.df && column < p.n) ptx::store(p.df + column, sum_column(p.df_rows_data + column, p.df_rows, p.n));
}

static cudaError_t sum_partials(const Partials& p, cudaStream_t stream) {
  const int64_t results = p.n * (p.df ? 2 : 1) + p.groups * p.k;
  return ptx::launch<sum_partials_kernel>((results + kThreads - 1) / kThreads, 0, stream, p);
}

}  // namespace rlrr
