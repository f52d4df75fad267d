// Global memory to shared memory, a tile at a time, zeros beyond the matrix's edge.
#pragma once

#include "numeric.cuh"
#include "tile.cuh"

namespace rlrr {

// A matrix as the kernels read it. `vectors`: rows can be copied 16 bytes at a time.
struct Source {
  const char* data;
  int64_t row_stride, col_stride;
  Dtype dtype;
  bool vectors;
};

// Zero-filled beyond the edge, so that a sum over padded depth adds 0 * 0 and never 0 * garbage. Where one side of a
// product ends there and the other does not, 0 * infinity is NaN: what uses it must leave it out.
template <class Shared>
RLRR_DEVICE void copy_vectors(Shared to, const Source& from, int64_t row, int64_t col, int rows, int cols) {
  using T = typename Shared::Element;
  constexpr int kBytes = sizeof(T), kVector = 16 / kBytes, kVectors = Shared::kCols / kVector;
  static_assert(kThreads % kVectors == 0 && Shared::kRows % (kThreads / kVectors) == 0);
  constexpr int kRowsAtOnce = kThreads / kVectors;
  const int c = ptx::thread() % kVectors * kVector, r = ptx::thread() / kVectors;
  const int left = (cols - c) * kBytes;
  const int bytes = left < 0 ? 0 : left > 16 ? 16 : left;
  // an address past the edge is formed, and not read: 0 bytes of it are asked for
  const char* source = from.data + ((row + r) * from.row_stride + col + c) * kBytes;
  const int64_t stride = kRowsAtOnce * from.row_stride * kBytes;
  char* const shared = to.at(r, c);
  if (rows == Shared::kRows && cols == Shared::kCols) {
    // most tiles even of a block that meets an edge: a copy is two instructions here, and a dozen below
#pragma unroll
    for (int i = 0; i < Shared::kRows / kRowsAtOnce; ++i, source += stride)
      ptx::copy_async<16>(shared + i * kRowsAtOnce * Shared::kRowBytes, source);
    return;
  }
#pragma unroll
  for (int i = 0; i < Shared::kRows / kRowsAtOnce; ++i, source += stride)
    ptx::copy_async<16>(shared + i * kRowsAtOnce * Shared::kRowBytes, source, r + i * kRowsAtOnce < rows ? bytes : 0);
}

// Tiles of one matrix a fixed way apart, all of them whole and of vectors: nothing is left to be worked
// out in a loop but the next address.
template <class Shared>
class Stream {
 public:
  // From the tile at (row, col) on; `step`: elements from one to the next.
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

// Any strides, any dtype; synchronous. Neighbouring threads follow the smaller stride.
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

// The tile at (row, col), of which `rows` x `cols` lie inside what is to be read.
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

// kCount floats, by 4 bytes each: u and v may start anywhere.
template <int kCount>
RLRR_DEVICE void copy_floats(char* to, const float* from, int count) {
  static_assert(kCount <= kThreads);
  const int i = ptx::thread();
  if (i < kCount) ptx::copy_async<4>(to + 4 * i, i < count ? from + i : from, i < count ? 4 : 0);
}

}  // namespace rlrr
