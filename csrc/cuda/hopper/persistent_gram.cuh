// The kernel of grad_scales: persistent blocks compute tiles of G = dy^T x and reduce each against W.
//
// The depth is the tokens here, and an item of work is a tile with a split of the tokens. du, dv and df are linear in
// G, so that splits leave partial sums, which a second kernel adds in a fixed order.
#pragma once

#include "tensor_map.h"
#include "warpgroups.cuh"

namespace rlrr::hopper {

constexpr int kGramStages = 4;
constexpr int kTileCols = 256;
constexpr int kMultiplyingWarps = kConsumers * kWarpgroup / 32;

struct Gram {
  CUtensorMap dy, x, weight;  // boxes of 64 x 64
  const float* u;
  const float* v;
  // partial sums of the rows and cols of a slice
  float* du_partial;  // [splits * column tiles, rows]
  float* dv_partial;  // [groups, splits * row tiles of a group, cols]
  float* df_partial;  // [splits, rows], or null
  int k, group_rows;
  int first_group, first_tile, first_col, rows, cols;  // of the slice
  int group_tiles, row_tiles, col_tiles;               // of the slice
  int steps, split_steps, splits;                      // of 64 tokens
  int items;
};

struct GramMemory {
  static constexpr int kDyBoxes = kConsumers, kXBoxes = kTileCols / kBox, kBoxes = kDyBoxes + kXBoxes;

  char boxes[kGramStages][kBoxes][kBoxBytes];
  float dv[kMultiplyingWarps][kTileCols];
  Ring<kGramStages> ring;
};

// The tiles of one split are consecutive items, since they share its rows of dy and x in L2.
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

// With P = G * W,  du = P v  and  dv = P^T u. G stays in registers. W comes through the same ring as dy and x, half a
// tile at a time, so that it has arrived when the products end.

// Each of the eight lanes of one t has eight values; lane g returns the sum of all g-th values.
RLRR_DEVICE float reduce_scatter(float (&values)[8], int g) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = g & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? values[i + half] : values[i];
      const float give = upper ? values[i] : values[i + half];
      values[i] = keep + ptx::shuffle_xor(give, 4 * half);
    }
  }
  return values[0];
}

// The rows g and g + 8 of a lane: whether they exist, their u, and their sums for du.
struct RowShare {
  bool inside[2];
  float u[2];
  float du[2];
};

// Reduces G against half a tile of W: 128 columns, in two boxes. `v`: of these columns, `cols` of which exist. Adds to
// du of the rows, and stores dv of each column for this warp.
template <class T>
RLRR_DEVICE void reduce_half(const float* sums, const char* boxes, RowShare& rows, const float* v, int cols, float* dv,
                             const Lane& l) {
#pragma unroll
  for (int first = 0; first < kTileCols / 2; first += 32) {
    float column[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = first + 8 * j;
      const bool col_inside = col < cols;  // K is a multiple of 8
      const float2 v_pair =
          col_inside ? ptx::load(reinterpret_cast<const float2*>(v + col + 2 * l.t)) : float2{0.0f, 0.0f};
      float2 dv_pair = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = swizzled(16 * l.warp + l.g + 8 * i, col % kBox / 8) + 4 * l.t;
        const float2 w = ptx::widen2<T>(ptx::load_shared<uint32_t>(boxes + col / kBox * kBoxBytes + at));
        const float* g = sums + col / 2 + 2 * i;
        // after the rows of the group dy of the next one follows; beyond the matrix 0 times infinity is NaN
        const bool inside = rows.inside[i] && col_inside;
        const float2 p = {inside ? g[0] * w.x : 0.0f, inside ? g[1] * w.y : 0.0f};
        rows.du[i] = ptx::fma(p.y, v_pair.y, ptx::fma(p.x, v_pair.x, rows.du[i]));
        dv_pair.x = ptx::fma(p.x, rows.u[i], dv_pair.x);
        dv_pair.y = ptx::fma(p.y, rows.u[i], dv_pair.y);
      }
      column[2 * j] = dv_pair.x, column[2 * j + 1] = dv_pair.y;
    }
    const float sum = reduce_scatter(column, l.g);
    ptx::store_shared(reinterpret_cast<char*>(dv + first + 8 * (l.g / 2) + 2 * l.t + l.g % 2), sum);
  }
}

// A tile of G in the registers of two warpgroups. Both operands of its products are in shared memory, so that a step
// takes 70 instructions a warp.
template <class T>
struct GramMultiplication {
  static constexpr int kParts = kBox / 16;

  const Gram& p;
  GramMemory& s;
  const Lane l = lane();
  Place<kGramStages> place = {}, multiplied = {};
  ptx::Products<kTileCols> sums;

  RLRR_DEVICE void multiply(int steps) {
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, place.next()) {
      place.await(s.ring);
      auto& boxes = s.boxes[place.stage];
      const uint64_t dy = matrix_descriptor(boxes[l.consumer], kBoxBytes);
      const uint64_t x = matrix_descriptor(boxes[GramMemory::kDyBoxes], kBoxBytes);
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        ptx::multiply_transposed<T>(sums, dy + part * kDownRows, x + part * kDownRows);
      ptx::wait_products<kParts>();
      // all products that still run belong to this step
      if (step > 0) release_stage();
    }
    ptx::finish(sums);
    release_stage();
  }
  RLRR_DEVICE void release_stage() {
    multiplied.release(s.ring);
    multiplied.next();
  }

  RLRR_DEVICE void reduce(const GramItem& item) {
    const int row = item.row + kBox * l.consumer + 16 * l.warp + l.g;
    RowShare rows = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rows.inside[i] = row + 8 * i < item.row_end;
      if (rows.inside[i]) rows.u[i] = ptx::load(p.u + row + 8 * i);
    }
    float* dv = s.dv[4 * l.consumer + l.warp];
    const float* v = p.v + static_cast<int64_t>(item.group) * p.k + item.col;
#pragma unroll
    for (int half = 0; half < 2; ++half, place.next()) {
      constexpr int kCols = kTileCols / 2;
      place.await(s.ring);
      reduce_half<T>(sums + half * kCols / 2, s.boxes[place.stage][2 * l.consumer], rows, v + half * kCols,
                     p.k - item.col - half * kCols, dv + half * kCols, l);
      release_stage();
    }
    float* du = p.du_partial + (static_cast<int64_t>(item.split) * p.col_tiles + item.col_tile) * p.rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = rows.du[i];
      sum += ptx::shuffle_xor(sum, 1);
      sum += ptx::shuffle_xor(sum, 2);
      if (l.t == 0 && rows.inside[i]) ptx::store(du + item.row_in_slice + row - item.row + 8 * i, sum);
    }
    add_warps(item);
  }

  // Each thread adds dv of one column over all eight warps, in their order.
  RLRR_DEVICE void add_warps(const GramItem& item) {
    ptx::named_barrier(1, kConsumers * kWarpgroup);
    const int col = ptx::thread() - kWarpgroup;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kMultiplyingWarps; ++warp)
      sum += ptx::load_shared<float>(reinterpret_cast<const char*>(&s.dv[warp][col]));
    const int64_t of_group = static_cast<int64_t>(item.row_tile / p.group_tiles) * p.splits + item.split;
    const int64_t row = of_group * p.group_tiles + item.row_tile % p.group_tiles;
    if (item.col + col < p.k) ptx::store(p.dv_partial + row * p.cols + item.col_in_slice + col, sum);
    // all must have read it before the next item overwrites it
    ptx::named_barrier(1, kConsumers * kWarpgroup);
  }
};

// df is dy summed over the tokens. Two warps of the producer, which are idle otherwise, add up the dy that is in shared
// memory for the products. df does not depend on the columns of G, so that the first column of tiles computes it.
constexpr int kAddingWarps = 2;

template <class T>
RLRR_DEVICE void add_tokens(const Gram& p, GramMemory& s) {
  const int pair = ptx::thread() - 32;  // of columns of dy
  Place<kGramStages> place;
  for (int index = ptx::block(); index < p.items; index += ptx::blocks()) {
    const GramItem item = item_at(p, index);
    float2 total = {0.0f, 0.0f};
#pragma unroll 1
    for (int step = 0; step < item.steps + 2; ++step, place.next()) {
      place.await(s.ring);
      if (item.col_tile == 0 && step < item.steps) {
        const char* box = s.boxes[place.stage][pair / 32];
        float2 sum = {0.0f, 0.0f};
#pragma unroll 1
        for (int token = 0; token < kBox; token += 8) {
          uint32_t pairs[8];  // all loads are in flight before the first addition
#pragma unroll
          for (int i = 0; i < 8; ++i)
            pairs[i] = ptx::load_shared<uint32_t>(box + token * kRowBytes + swizzled(i, pair % 32 / 4) + pair % 4 * 4);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float2 dy = ptx::widen2<T>(pairs[i]);
            sum.x += dy.x, sum.y += dy.y;
          }
        }
        total.x += sum.x, total.y += sum.y;
      }
      place.release(s.ring);
    }
    if (item.col_tile != 0) continue;
    float* df = p.df_partial + static_cast<int64_t>(item.split) * p.rows + item.row_in_slice + 2 * pair;
    const int rows = item.row_end - item.row - 2 * pair;
    if (rows > 0) ptx::store(df, total.x);
    if (rows > 1) ptx::store(df + 1, total.y);
  }
}

RLRR_DEVICE void fetch(const Gram& p, GramMemory& s) {
  ptx::prefetch(p.dy), ptx::prefetch(p.x), ptx::prefetch(p.weight);
  Place<kGramStages> place;
  for (int index = ptx::block(); index < p.items; index += ptx::blocks()) {
    const GramItem item = item_at(p, index);
#pragma unroll 1
    for (int step = 0; step < item.steps; ++step, place.next()) {
      Barrier* full = place.claim(s.ring, GramMemory::kBoxes * kBoxBytes);
      auto& boxes = s.boxes[place.stage];
      const int token = (item.first_step + step) * kBox;
      for (int i = 0; i < GramMemory::kDyBoxes; ++i) ptx::copy_box(boxes[i], p.dy, token, item.row + i * kBox, full);
      for (int i = 0; i < GramMemory::kXBoxes; ++i)
        ptx::copy_box(boxes[GramMemory::kDyBoxes + i], p.x, token, item.col + i * kBox, full);
    }
    for (int half = 0; half < 2; ++half, place.next()) {
      Barrier* full = place.claim(s.ring, 2 * kConsumers * kBoxBytes);
      for (int i = 0; i < 2 * kConsumers; ++i)
        ptx::copy_box(s.boxes[place.stage][i], p.weight, item.row + i / 2 * kBox,
                      item.col + half * kTileCols / 2 + i % 2 * kBox, full);
    }
  }
}

template <class T>
RLRR_HOPPER_KERNEL gram_kernel(RLRR_PARAMETER Gram p) {
  GramMemory& s = *reinterpret_cast<GramMemory*>(ptx::swizzled_shared_memory());
  const int warp = ptx::thread() / 32;
  if (ptx::thread() == 0) s.ring.init(kMultiplyingWarps + (p.df_partial ? kAddingWarps : 0));
  ptx::barrier();
  if (ptx::thread() < kWarpgroup) {
    ptx::give_registers<kProducerRegisters>();
    if (ptx::thread() == 0) fetch(p, s);
    if (p.df_partial && warp >= 1 && warp <= kAddingWarps) add_tokens<T>(p, s);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    GramMultiplication<T> multiplication{p, s};
    for (int index = ptx::block(); index < p.items; index += ptx::blocks()) {
      const GramItem item = item_at(p, index);
      multiplication.multiply(item.steps);
      multiplication.reduce(item);
    }
  }
}

}  // namespace rlrr::hopper
