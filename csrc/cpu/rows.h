// Rows of a matrix as the loops want them: contiguous.
#pragma once

#include <vector>

#include "types.h"

namespace rlrr {

// Gives a contiguous stretch of a row: the matrix's own memory, or a copy where its columns lie apart.
template <class T>
class ContiguousRow {
 public:
  explicit ContiguousRow(const Matrix& matrix) : matrix_(matrix) {
    if (matrix.col_stride != 1) copy_.resize(matrix.cols);
  }

  const T* operator()(int64_t row, int64_t col, int64_t count) {
    const T* start = matrix_.at<T>(row, col);
    if (matrix_.col_stride == 1) return start;
    for (int64_t i = 0; i < count; ++i) copy_[i] = start[i * matrix_.col_stride];
    return copy_.data();
  }

 private:
  const Matrix& matrix_;
  std::vector<T> copy_;
};

}  // namespace rlrr
