// From a tile of G = dy^T x to its part of du and dv: with P = G * W,  du = P v  and  dv = P^T u.
//
// G stays in registers. W is copied into the shared memory that the loop no longer needs, which handles its dtype,
// strides and edges. Each lane reduces the values that it holds, the lanes of a row or a column exchange their sums,
// and those of the warps are added through shared memory. The order of each sum depends on the shape of the tile alone.
#pragma once

#include "tile.cuh"

namespace rlrr {

// The part of the layer under a tile of G: W from (n, k) on, rows x cols of which exist; u and v start there as well.
struct Patch {
  Source weight;
  const float *u, *v;
  int64_t n, k;
  int rows, cols;
};

template <class Staged, class Tile>
struct PatchShared {
  // neighbouring lanes read pairs in different rows: 8 banks a row separate float2, 4 separate 16-bit pairs
  using Weight = SharedTile<Staged, Tile::kRows, Tile::kCols, sizeof(Staged) == 4 ? 32 : 16>;
  static constexpr int kShares = 4 * (Tile::kWarpCols * Tile::kRows + Tile::kWarpRows * Tile::kCols);
  static constexpr int kBytes = Weight::kBytes + 4 * (Tile::kRows + Tile::kCols) + kShares;

  Weight weight{ptx::shared_memory()};
  char* u = weight.data + Weight::kBytes;
  char* v = u + 4 * Tile::kRows;
  char* du = v + 4 * Tile::kCols;                     // [kWarpCols][kRows]
  char* dv = du + 4 * Tile::kWarpCols * Tile::kRows;  // [kWarpRows][kCols]
};

template <class T>
RLRR_DEVICE float2 load_pair(const char* shared) {
  if constexpr (sizeof(T) == 4) {
    return ptx::load_shared<float2>(shared);
  } else {
    return ptx::widen2<T>(ptx::load_shared<uint32_t>(shared));
  }
}

template <class Staged, class Tile>
RLRR_DEVICE void reduce_warp(const typename Tile::Accumulator& g, const PatchShared<Staged, Tile>& s) {
  const Lane l = lane();
  const int warp_row = Tile::warp_row(), warp_col = Tile::warp_col();
  float dv[Tile::kColTiles][2] = {};
#pragma unroll
  for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
    const int row = warp_row + 8 * i + l.g;
    const float u = ptx::load_shared<float>(s.u + 4 * row);
    float du = 0.0f;
#pragma unroll
    for (int j = 0; j < Tile::kColTiles; ++j) {
      const int col = warp_col + 8 * j + 2 * l.t;
      const float2 w = load_pair<Staged>(s.weight.at(row, col)), v = ptx::load_shared<float2>(s.v + 4 * col);
      const float low = g[i / 2][j][i % 2 * 2] * w.x, high = g[i / 2][j][i % 2 * 2 + 1] * w.y;
      du = ptx::fma(high, v.y, ptx::fma(low, v.x, du));
      dv[j][0] = ptx::fma(low, u, dv[j][0]);
      dv[j][1] = ptx::fma(high, u, dv[j][1]);
    }
    du += ptx::shuffle_xor(du, 1);
    du += ptx::shuffle_xor(du, 2);
    if (l.t == 0) ptx::store_shared(s.du + 4 * (warp_col / Tile::kColsOfWarp * Tile::kRows + row), du);
  }
#pragma unroll
  for (int j = 0; j < Tile::kColTiles; ++j)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = dv[j][c];
      sum += ptx::shuffle_xor(sum, 4);
      sum += ptx::shuffle_xor(sum, 8);
      sum += ptx::shuffle_xor(sum, 16);
      const int col = warp_col + 8 * j + 2 * l.t + c;
      if (l.g == 0) ptx::store_shared(s.dv + 4 * (warp_row / Tile::kRowsOfWarp * Tile::kCols + col), sum);
    }
}

template <int kShares, int kCount>
RLRR_DEVICE void add_shares(const char* shares, float* to, int count) {
  const int i = ptx::thread();
  if (i >= count) return;
  float sum = 0.0f;
#pragma unroll
  for (int share = 0; share < kShares; ++share) sum += ptx::load_shared<float>(shares + 4 * (share * kCount + i));
  ptx::store(to + i, sum);
}

template <class Staged, class Tile>
RLRR_DEVICE void reduce_tile(typename Tile::Accumulator& g, const Patch& p, float* du, float* dv) {
  static_assert(Tile::kRows <= kThreads && Tile::kCols <= kThreads);
  const PatchShared<Staged, Tile> s;
  ptx::barrier();  // the last stages of the pipeline lie here and must have been read
  copy_tile(s.weight, p.weight, p.n, p.k, p.rows, p.cols);
  copy_floats<Tile::kRows>(s.u, p.u, p.rows);
  copy_floats<Tile::kCols>(s.v, p.v, p.cols);
  ptx::commit_copies();
  if (p.rows < Tile::kRows || p.cols < Tile::kCols) Tile::clear_outside(g, p.rows, p.cols);
  ptx::wait_copies<0>();
  ptx::barrier();
  reduce_warp<Staged, Tile>(g, s);
  ptx::barrier();
  add_shares<Tile::kWarpCols, Tile::kRows>(s.du, du, p.rows);
  add_shares<Tile::kWarpRows, Tile::kCols>(s.dv, dv, p.cols);
}

}  // namespace rlrr
