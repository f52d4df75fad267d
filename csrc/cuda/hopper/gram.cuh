// What grad_scales works on: tiles of G = dy^T x, each over a split of the tokens.
//
// Depth is the tokens here. All that is wanted of G is linear in it, so splits need no more than partial
// sums, which a second kernel adds in a fixed order.
#pragma once

#include "pipeline.cuh"
#include "tile.cuh"

namespace rlrr::hopper {

constexpr int kGramStages = 4;
constexpr int kTileCols = 256;
constexpr int kMultiplyingWarps = kConsumers * kWarpgroup / 32;

struct Gram {
  CUtensorMap dy, x, weight;  // boxes of 64 x 64
  const float* u;
  const float* v;
  // partial sums of a slice's rows and cols
  float* du_partial;  // [splits * column tiles, rows]
  float* dv_partial;  // [groups, splits * row tiles of a group, cols]
  float* df_partial;  // [splits, rows], or null
  int k, group_rows;
  int first_group, first_tile, first_col, rows, cols;  // the slice's
  int group_tiles, row_tiles, col_tiles;               // the slice's
  int steps, split_steps, splits;                      // of 64 tokens
  int items;
};

struct GramMemory {
  static constexpr int kDyBoxes = kConsumers, kXBoxes = kTileCols / kBox, kBoxes = kDyBoxes + kXBoxes;

  char boxes[kGramStages][kBoxes][kBoxBytes];
  float dv[kMultiplyingWarps][kTileCols];
  Ring<kGramStages> ring;
};

// The tiles of one split stand together: they share its rows of dy and x in L2.
struct GramItem {
  int col_tile, row_tile, split;
  int group, row, row_end, col;
  int row_in_slice, col_in_slice;
  int first_step, steps;
};
RLRR_DEVICE GramItem item_at(const Gram& p, int index) {
  const int of_split = p.row_tiles * p.col_tiles;
  const int tile = index % of_split;
  GramItem item;
  item.split = index / of_split;
  item.row_tile = tile / p.col_tiles, item.col_tile = tile % p.col_tiles;
  item.group = p.first_group + item.row_tile / p.group_tiles;
  item.row = item.group * p.group_rows + (p.first_tile + item.row_tile % p.group_tiles) * kTileRows;
  item.row_end = (item.group + 1) * p.group_rows;
  item.row_in_slice = item.row - p.first_group * p.group_rows - p.first_tile * kTileRows;
  item.col_in_slice = item.col_tile * kTileCols;
  item.col = p.first_col + item.col_in_slice;
  item.first_step = item.split * p.split_steps;
  const int left = p.steps - item.first_step;
  item.steps = left < p.split_steps ? left : p.split_steps;
  return item;
}

}  // namespace rlrr::hopper
