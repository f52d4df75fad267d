// What grad_scales works on: tiles of G = dy^T x, each over a split of the tokens.
//
// Depth is the tokens here. All that is wanted of G is linear in it, so splits need no more than partial
// sums, which a second kernel adds in a fixed order.
#pragma once

#include "pipeline.cuh"
#include "tile.cuh"

namespace rlrr::hopper {

constexpr int kGramStages = 4;
constexpr int kMultiplyingWarps = kConsumers * kWarpgroup / 32;

struct Gram {
  CUtensorMap dy, x, weight;  // boxes of 64 x 64
  const float* u;
  const float* v;
  float* du_partial;  // [splits * column tiles, N]
  float* dv_partial;  // [groups, splits * row tiles of a group, K]
  float* df_partial;  // [splits, N], or null
  int n, k, group_rows;
  int group_tiles, row_tiles, col_tiles;
  int steps, split_steps, splits;  // of 64 tokens
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
  int first_step, steps;
};
RLRR_DEVICE GramItem item_at(const Gram& p, int index) {
  const int of_split = p.row_tiles * p.col_tiles;
  const int tile = index % of_split, split = index / of_split;
  const int row_tile = tile / p.col_tiles, col_tile = tile % p.col_tiles, group = row_tile / p.group_tiles;
  const int first = split * p.split_steps, left = p.steps - first;
  return {col_tile,
          row_tile,
          split,
          group,
          group * p.group_rows + row_tile % p.group_tiles * kTileRows,
          (group + 1) * p.group_rows,
          col_tile * kTileCols,
          first,
          left < p.split_steps ? left : p.split_steps};
}

}  // namespace rlrr::hopper
