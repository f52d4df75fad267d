// A tile of G in the registers of two warpgroups, and what becomes of it there.
#pragma once

#include "gram.cuh"
#include "reduce.cuh"

namespace rlrr::hopper {

// Nothing passes through registers on the way to these products: a step is 70 instructions a warp.
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
      // what still runs is of this step
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

  // A column of the tile to a thread: dv of all eight warps, in their order.
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
    // read by all before the next item's overwrite it
    ptx::named_barrier(1, kConsumers * kWarpgroup);
  }
};

}  // namespace rlrr::hopper
