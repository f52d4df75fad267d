// What forward and grad_input have in common: rows of W' times tokens, summed over the depth.
//
// To forward a row is one of N and the depth is K, to grad_input it is the other way round; S at a row
// and a depth is 1 + row_scale * depth_scale either way. Forward's rows fall into groups with depth
// scales of their own, grad_input's depth into segments with row scales of their own.
#pragma once

#include "pipeline.cuh"
#include "plan.h"
#include "tile.cuh"

namespace rlrr::hopper {

constexpr int kProductStages = 4;

struct Product {
  CUtensorMap weight;        // boxes of 64 x 64
  CUtensorMap tokens;        // boxes of a tile's tokens x 64 of depth
  CUtensorMap depth_scales;  // a group's in a row
  const float* row_scales;
  int64_t row_scale_stride;  // from a segment to the next
  int row_groups, group_rows;
  int segments, segment;  // where there are several, a segment is a multiple of 64
  int64_t token_count;
  Vector bias, shift;  // of rows
  char* out;           // [tokens, rows]
  int64_t out_stride;
  int64_t tiles;
};

template <int kTokens>
struct ProductMemory {
  char weight[kProductStages][kConsumers][kBoxBytes];
  char tokens[kProductStages][kTokens * kRowBytes];
  char staging[kConsumers][kBoxBytes];
  char depth_scales[kProductStages][kBox * 4];
  Ring<kProductStages> ring;

  static constexpr int kStageBytes = kConsumers * kBoxBytes + kTokens * kRowBytes + kBox * 4;
};

struct ProductTile {
  int64_t token;
  int group, row, row_end;
};

// Rows run fastest: the tiles in flight share a few bands of tokens and all of W, which fits in L2.
template <int kTokens>
RLRR_DEVICE ProductTile tile_at(const Product& p, int64_t index) {
  const int of_group = (p.group_rows + kTileRows - 1) / kTileRows, of_rows = p.row_groups * of_group;
  const int tile = static_cast<int>(index % of_rows), group = tile / of_group;
  return {index / of_rows * kTokens, group, group * p.group_rows + tile % of_group * kTileRows,
          (group + 1) * p.group_rows};
}
RLRR_DEVICE int segment_steps(const Product& p) { return (p.segment + kBox - 1) / kBox; }

}  // namespace rlrr::hopper
