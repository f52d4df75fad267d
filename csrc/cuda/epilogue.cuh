// From accumulators to results: rounding and storing a tile, and adding the sums of a depth that blocks have shared.
#pragma once

#include "tile.cuh"

namespace rlrr {

template <bool kPairs, class Tile, class T, class Term>
RLRR_DEVICE void store_values(const typename Tile::Accumulator& acc, T* to, int64_t row_stride, int rows, int cols,
                              const Term& term) {
  const Lane l = lane();
  const int first_row = Tile::warp_row() + l.g;
#pragma unroll
  for (int j = 0; j < Tile::kColTiles; ++j) {
    const int col = Tile::warp_col() + 8 * j + 2 * l.t;
    if (col >= cols) continue;
    const bool both = kPairs || col + 1 < cols;
    const float low_term = term(col), high_term = both ? term(col + 1) : 0.0f;
    T* at = to + first_row * row_stride + col;
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i, at += 8 * row_stride) {
      if (first_row + 8 * i >= rows) continue;
      const float low = acc[i / 2][j][i % 2 * 2] + low_term, high = acc[i / 2][j][i % 2 * 2 + 1] + high_term;
      if constexpr (kPairs && sizeof(T) == 4) {
        ptx::store(reinterpret_cast<float2*>(at), float2{low, high});
      } else if constexpr (kPairs) {
        ptx::store(reinterpret_cast<uint32_t*>(at), ptx::narrow2<T>(low, high));
      } else {
        ptx::store(at, narrow<T>(low));
        if (both) ptx::store(at + 1, narrow<T>(high));
      }
    }
  }
}

// Stores a tile to a row-major matrix, rounded once, after adding term(col) to each column. `to` is the first element
// of the tile, of which `rows` x `cols` lie inside the matrix. Pairs are stored together where all of them are aligned.
template <class Tile, class T, class Term>
RLRR_DEVICE void store_tile(const typename Tile::Accumulator& acc, T* to, int64_t row_stride, int rows, int cols,
                            const Term& term) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0 && row_stride % 2 == 0;
  if (aligned && cols % 2 == 0) {
    store_values<true, Tile>(acc, to, row_stride, rows, cols, term);
  } else {
    store_values<false, Tile>(acc, to, row_stride, rows, cols, term);
  }
}

// If the depth of a product is split among blocks, each leaves its float32 sums in the workspace, and a second kernel
// adds them in a fixed order. The result is then rounded once, and two runs agree bit for bit. Blocks do not wait for
// each other, and no counters have to be set to zero first.

struct SplitSums {
  const float* partials;  // [splits, m, n]
  int splits;
  Vector bias, shift;  // [n] each, or absent
  void* result;        // [m, n]
  int64_t row_stride;
  int m, n;
};

RLRR_DEVICE float column_term(const Vector& bias, const Vector& shift, int64_t column) {
  const float term = bias.data ? load_float(bias.data, column, bias.dtype) : 0.0f;
  return term + (shift.data ? load_float(shift.data, column, shift.dtype) : 0.0f);
}

// Each thread adds four neighbours: one 16-byte load for each split.
template <class T>
RLRR_DEVICE void add_vectors(const SplitSums& s) {
  const int at = 4 * (ptx::block() * kThreads + ptx::thread()), stride = s.m * s.n;
  if (at >= stride) return;
  const int row = at / s.n, column = at % s.n;
  float4 sum = ptx::load(reinterpret_cast<const float4*>(s.partials + at));
#pragma unroll 4
  for (int split = 1; split < s.splits; ++split) {
    const float4 more = ptx::load(reinterpret_cast<const float4*>(s.partials + split * stride + at));
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  sum.x += column_term(s.bias, s.shift, column), sum.y += column_term(s.bias, s.shift, column + 1);
  sum.z += column_term(s.bias, s.shift, column + 2), sum.w += column_term(s.bias, s.shift, column + 3);
  T* to = static_cast<T*>(s.result) + row * s.row_stride + column;
  if constexpr (sizeof(T) == 4) {
    ptx::store(reinterpret_cast<float4*>(to), sum);
  } else {
    const float2 packed = {ptx::from_bits(ptx::narrow2<T>(sum.x, sum.y)),
                           ptx::from_bits(ptx::narrow2<T>(sum.z, sum.w))};
    ptx::store(reinterpret_cast<float2*>(to), packed);
  }
}

template <class T>
RLRR_DEVICE void add_elements(const SplitSums& s) {
  const int at = ptx::block() * kThreads + ptx::thread(), stride = s.m * s.n;
  if (at >= stride) return;
  const int row = at / s.n, column = at % s.n;
  float sum = ptx::load(s.partials + at);
#pragma unroll 4
  for (int split = 1; split < s.splits; ++split) sum += ptx::load(s.partials + split * stride + at);
  sum += column_term(s.bias, s.shift, column);
  ptx::store(static_cast<T*>(s.result) + row * s.row_stride + column, narrow<T>(sum));
}

// Static, since two source files include it.
template <class T, bool kVectors>
static RLRR_KERNEL(2) add_splits_kernel(RLRR_PARAMETER SplitSums s) {
  if constexpr (kVectors) {
    add_vectors<T>(s);
  } else {
    add_elements<T>(s);
  }
}

template <class T>
static cudaError_t add_splits(const SplitSums& s, cudaStream_t stream) {
  const auto aligned = [](const void* data, int bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
  const bool vectors =
      s.n % 4 == 0 && s.row_stride % 4 == 0 && aligned(s.result, 4 * sizeof(T)) && aligned(s.partials, 16);
  const int a_block = kThreads * (vectors ? 4 : 1), blocks = (s.m * s.n + a_block - 1) / a_block;
  return vectors ? ptx::launch<add_splits_kernel<T, true>>(blocks, 0, stream, s)
                 : ptx::launch<add_splits_kernel<T, false>>(blocks, 0, stream, s);
}

}  // namespace rlrr
