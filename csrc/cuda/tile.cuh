// Tiles: how the warps of a block share its output, how operands lie in shared memory, and how they are copied there.
//
// Of each 16 x 8 tile of an accumulator a lane holds rows g and g + 8 of columns 2t and 2t + 1, where g = lane / 4 and
// t = lane % 4. This is the layout of mma.sync; plain float32 uses it too, so that all share one epilogue.
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

// A block computes kRows x kCols of output, kDepth of the sum at a time, with kWarpRows x kWarpCols warps.
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
  // Clears the sums outside rows x cols: an infinity times a padding zero made NaN of them.
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

// Which index of an operand runs along the rows of its tile in shared memory: the depth, or the other one.
enum class Inner { depth, other };

// The tile of an operand. The padding shifts rows by as many banks as avoid conflicts when fragments are loaded. It is
// a multiple of 16 bytes, since ldmatrix and cp.async need aligned rows.
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

// In 16-bit tiles, and in float32 tiles that are read by ldmatrix or 16-byte loads, a shift of 4 (or 20) banks a row
// puts any 8 rows into different banks. Where float32 is read value by value, lanes with neighbouring t are one row
// apart (two for 16-bit products): a shift of 8 (or 4) banks a row separates the four values of t.
constexpr int padding(int element_bytes, int math_bytes, bool tensor_cores, Inner inner) {
  if (element_bytes == 2 || !tensor_cores) return 16;
  const bool mixed = math_bytes == 2;
  return mixed == (inner == Inner::depth) ? 32 : 16;
}

// A matrix in global memory. `vectors`: its rows can be copied 16 bytes at a time.
struct Source {
  const char* data;
  int64_t row_stride, col_stride;
  Dtype dtype;
  bool vectors;
};

// Fills the tile with zeros beyond the edge of the matrix, so that a sum over padded depth adds 0 * 0. Where only one
// operand of a product ends, 0 * infinity is NaN: such sums must not be used.
template <class Shared>
RLRR_DEVICE void copy_vectors(Shared to, const Source& from, int64_t row, int64_t col, int rows, int cols) {
  using T = typename Shared::Element;
  constexpr int kBytes = sizeof(T), kVector = 16 / kBytes, kVectors = Shared::kCols / kVector;
  static_assert(kThreads % kVectors == 0 && Shared::kRows % (kThreads / kVectors) == 0);
  constexpr int kRowsAtOnce = kThreads / kVectors;
  const int c = ptx::thread() % kVectors * kVector, r = ptx::thread() / kVectors;
  const int left = (cols - c) * kBytes;
  const int bytes = left < 0 ? 0 : left > 16 ? 16 : left;
  // an address past the edge may be formed: 0 bytes of it are read
  const char* source = from.data + ((row + r) * from.row_stride + col + c) * kBytes;
  const int64_t stride = kRowsAtOnce * from.row_stride * kBytes;
  char* const shared = to.at(r, c);
  if (rows == Shared::kRows && cols == Shared::kCols) {
    // the usual case, even for blocks at an edge: a copy takes two instructions here, and a dozen below
#pragma unroll
    for (int i = 0; i < Shared::kRows / kRowsAtOnce; ++i, source += stride)
      ptx::copy_async<16>(shared + i * kRowsAtOnce * Shared::kRowBytes, source);
    return;
  }
#pragma unroll
  for (int i = 0; i < Shared::kRows / kRowsAtOnce; ++i, source += stride)
    ptx::copy_async<16>(shared + i * kRowsAtOnce * Shared::kRowBytes, source, r + i * kRowsAtOnce < rows ? bytes : 0);
}

// Copies whole tiles of one matrix, a fixed distance apart and by vectors. A loop that uses it computes nothing but the
// next address.
template <class Shared>
class Stream {
 public:
  // Starts at the tile at (row, col); tiles are `step` elements apart.
  RLRR_DEVICE Stream(const Source& matrix, int64_t row, int64_t col, int64_t step)
      : row_step_(kRowsAtOnce * matrix.row_stride * kBytes), step_(step * kBytes) {
    const int r = ptx::thread() / kVectors, c = ptx::thread() % kVectors * kVector;
    from_ = matrix.data + ((row + r) * matrix.row_stride + col + c) * kBytes;
    to_ = r * Shared::kRowBytes + c * kBytes;
  }
  RLRR_DEVICE void copy_next(const Shared& shared) {
    const char* from = from_;
#pragma unroll
    for (int i = 0; i < Shared::kRows / kRowsAtOnce; ++i, from += row_step_)
      ptx::copy_async<16>(shared.data + to_ + i * kRowsAtOnce * Shared::kRowBytes, from);
    from_ += step_;
  }

 private:
  static constexpr int kBytes = sizeof(typename Shared::Element), kVector = 16 / kBytes;
  static constexpr int kVectors = Shared::kCols / kVector, kRowsAtOnce = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0 && Shared::kRows % kRowsAtOnce == 0);

  const char* from_;
  int64_t row_step_, step_;
  int to_;
};

// For any strides and dtype; synchronous. Neighbouring threads follow the smaller stride.
template <class Shared>
RLRR_DEVICE void copy_elements(Shared to, const Source& from, int64_t row, int64_t col, int rows, int cols) {
  using T = typename Shared::Element;
  const bool down = from.row_stride < from.col_stride;
#pragma unroll 4
  for (int i = ptx::thread(); i < Shared::kRows * Shared::kCols; i += kThreads) {
    const int r = down ? i % Shared::kRows : i / Shared::kCols;
    const int c = down ? i / Shared::kRows : i % Shared::kCols;
    T value = {};
    if (r < rows && c < cols) {
      const int64_t index = (row + r) * from.row_stride + (col + c) * from.col_stride;
      if constexpr (sizeof(T) == 4) {
        value = load_float(from.data, index, from.dtype);
      } else {
        value = ptx::load(reinterpret_cast<const T*>(from.data) + index);
      }
    }
    ptx::store_shared(to.at(r, c), value);
  }
}

// Copies the tile at (row, col); `rows` x `cols` elements are left from there on, which may be more than the tile has.
template <class Shared>
RLRR_DEVICE void copy_tile(Shared to, const Source& from, int64_t row, int64_t col, int64_t rows, int64_t cols) {
  const int r = rows < Shared::kRows ? static_cast<int>(rows) : Shared::kRows;
  const int c = cols < Shared::kCols ? static_cast<int>(cols) : Shared::kCols;
  if (from.vectors) {
    copy_vectors(to, from, row, col, r, c);
  } else {
    copy_elements(to, from, row, col, r, c);
  }
}

// Copies kCount floats, 4 bytes at a time, since u and v need not be aligned to more.
template <int kCount>
RLRR_DEVICE void copy_floats(char* to, const float* from, int count) {
  static_assert(kCount <= kThreads);
  const int i = ptx::thread();
  if (i < kCount) ptx::copy_async<4>(to + 4 * i, i < count ? from + i : from, i < count ? 4 : 0);
}

// Calls copy(stage) and multiply(stage) once for each step, in order, the copies kStages - 1 steps ahead of the
// products that use them. `copy` starts copies or stores to its stage, `multiply` only reads it.
template <int kStages, class Copy, class Multiply>
RLRR_DEVICE void pipeline(int steps, const Copy& copy, const Multiply& multiply) {
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) copy(stage);
    ptx::commit_copies();
  }
  int stage = 0, stage_to_fill = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<kStages - 2>();
    // a thread waits for its own copies only, and all must have read the stage that is filled next
    ptx::barrier();
    if (step + kStages - 1 < steps) copy(stage_to_fill);
    // also if the group is empty, so that the number of groups is the number of steps
    ptx::commit_copies();
    multiply(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    stage_to_fill = stage_to_fill + 1 == kStages ? 0 : stage_to_fill + 1;
  }
}

}  // namespace rlrr
