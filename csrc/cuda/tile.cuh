// Tiles: how a block's output is shared among its warps, and how operands lie in shared memory.
//
// A lane holds of each 16 x 8 tile of an accumulator rows g and g + 8 of columns 2t and 2t + 1, with
// g = lane / 4 and t = lane % 4: the layout of mma.sync, which the plain float32 path adopts too, so
// that one epilogue serves all.
#pragma once

#include "machine.cuh"

namespace rlrr {

struct Lane {
  int index, g, t;
};
RLRR_DEVICE Lane lane() {
  const int index = ptx::thread() % 32;
  return {index, index / 4, index % 4};
}

// A block's kRows x kCols of output, computed kDepth at a time, by kWarpRows x kWarpCols warps.
template <int kRows_, int kCols_, int kDepth_, int kWarpRows_, int kWarpCols_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_, kCols = kCols_, kDepth = kDepth_, kStages = kStages_;
  static constexpr int kWarpRows = kWarpRows_, kWarpCols = kWarpCols_;
  static constexpr int kRowsOfWarp = kRows / kWarpRows, kColsOfWarp = kCols / kWarpCols;
  static constexpr int kRowTiles = kRowsOfWarp / 16, kColTiles = kColsOfWarp / 8;
  static_assert(kWarpRows * kWarpCols == kWarps);
  static_assert(kRowsOfWarp % 16 == 0 && kColsOfWarp % 16 == 0 && kStages >= 2);

  using Accumulator = float[kRowTiles][kColTiles][4];

  RLRR_DEVICE static int warp_row() { return ptx::thread() / 32 / kWarpCols * kRowsOfWarp; }
  RLRR_DEVICE static int warp_col() { return ptx::thread() / 32 % kWarpCols * kColsOfWarp; }

  RLRR_DEVICE static void clear(Accumulator& acc) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
  }
  // The sums outside rows x cols: infinities made NaN of the zeros that stand there.
  RLRR_DEVICE static void clear_outside(Accumulator& acc, int rows, int cols) {
    const Lane l = lane();
    const int first_row = warp_row() + l.g, first_col = warp_col() + 2 * l.t;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool inside = first_row + 16 * i + e / 2 * 8 < rows && first_col + 8 * j + e % 2 < cols;
          if (!inside) acc[i][j][e] = 0.0f;
        }
  }
};

// Which index of an operand's tile runs along its rows in shared memory.
enum class Inner { depth, other };

// An operand's tile. The padding turns rows by so many banks that a fragment's loads meet no
// conflict; 16 bytes at least, since ldmatrix and cp.async want aligned rows.
template <class T, int kRows_, int kCols_, int kPadding>
struct SharedTile {
  using Element = T;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kRowBytes = kCols * static_cast<int>(sizeof(T)) + kPadding;
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kRowBytes % 16 == 0);

  char* data;

  RLRR_DEVICE char* at(int row, int col) const { return data + row * kRowBytes + col * static_cast<int>(sizeof(T)); }
};

// 16-bit tiles, and float32 tiles that ldmatrix or 16-byte loads read: rows shifted by 4 banks (or 20)
// put any 8 of them side by side. Float32 read value by value: lanes of one t are a row apart (rows
// 2t apart for 16-bit products), so 8 banks (or 4) a row set the four t's side by side.
constexpr int padding(int element_bytes, int math_bytes, bool tensor_cores, Inner inner) {
  if (element_bytes == 2 || !tensor_cores) return 16;
  const bool mixed = math_bytes == 2;
  return mixed == (inner == Inner::depth) ? 32 : 16;
}

}  // namespace rlrr
