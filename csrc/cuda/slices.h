// How grad_scales works through a W whose partial sums would outgrow their workspace: slice by slice.
//
// A tile of G leaves a row of du's partial sums and one of dv's, so that the sums of all tiles grow with
// N * K. Launches cover a slice of the tiles each, one after another: 1.9 MB of sums stand for some 300
// (of a W one tile wide) to 3700 tiles, as many as a GPU works on at once or more. The layers of vision
// transformers are one slice.
#pragma once

#include <cuda_runtime_api.h>

#include "problem.h"

namespace rlrr {

// Of partial sums. Tokens are split no further than this allows.
constexpr int64_t kWorkspaceBytes = 1'900'000;

// Tiles of W: in `groups` groups from `group` on the row tiles [tile, tile + tiles) of each, and the
// column tiles [col_tile, col_tile + col_tiles). Where there are several groups, they are whole:
// its rows stand together in W, as its results do in du and dv.
struct Slice {
  int64_t group, groups, tile, tiles, col_tile, col_tiles;
  int64_t tile_rows, tile_cols, group_rows, k;

  int64_t first_row() const { return group * group_rows + tile * tile_rows; }
  int64_t rows() const {
    return groups > 1 ? groups * group_rows : least(tiles * tile_rows, group_rows - tile * tile_rows);
  }
  int64_t first_col() const { return col_tile * tile_cols; }
  int64_t cols() const { return least(col_tiles * tile_cols, k - first_col()); }
  // Of partial sums, a split; `df_rows` of them df's.
  int64_t floats(int64_t df_rows) const { return (col_tiles + df_rows) * rows() + groups * tiles * cols(); }

  static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Slices of at most this many groups, tiles of each and column tiles.
class Slices {
 public:
  Slices(const Layer& layer, int64_t tile_rows, int64_t tile_cols, int64_t df_rows) : df_rows_(df_rows) {
    const int64_t group_rows = layer.n / layer.groups;
    all_ = {0,         layer.groups, 0,      up(group_rows, tile_rows), 0, up(layer.k, tile_cols), tile_rows,
            tile_cols, group_rows,   layer.k};
    step_ = all_;
    const int64_t most = kWorkspaceBytes / 4;
    if (all_.floats(df_rows) <= most) return;
    // whole rows of tiles where they fit, then as many of them as fit
    step_.col_tiles = even(all_.col_tiles, (most - df_rows * tile_rows) / (tile_rows + tile_cols));
    const int64_t tiles = most / ((step_.col_tiles + df_rows) * tile_rows + step_.col_tiles * tile_cols);
    step_.tiles = even(all_.tiles, tiles);
    const bool whole_groups = step_.tiles == all_.tiles && step_.col_tiles == all_.col_tiles;
    step_.groups = whole_groups ? even(all_.groups, tiles / all_.tiles) : 1;
  }

  bool one() const {
    return step_.groups == all_.groups && step_.tiles == all_.tiles && step_.col_tiles == all_.col_tiles;
  }
  // Of the largest.
  int64_t floats() const { return step_.floats(df_rows_); }

  // Calls run(slice) until one returns an error. Results that several slices add to are added to in this order.
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
  // Parts of at most `most`, as even as can be.
  static constexpr int64_t even(int64_t count, int64_t most) { return up(count, up(count, most)); }

  Slice all_, step_;
  int64_t df_rows_;
};

}  // namespace rlrr
