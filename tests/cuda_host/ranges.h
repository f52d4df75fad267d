// What a pass may touch: told to the model before each call.
#pragma once

#include "problem.h"

namespace rlrr {
namespace {

void allow(const Matrix& matrix, int64_t rows, int64_t cols, bool writable) {
  const int64_t last = (rows - 1) * matrix.row_stride + (cols - 1) * matrix.col_stride;
  model::allow(matrix.data, (last + 1) * (matrix.dtype == Dtype::float32 ? 4 : 2), writable);
}
void allow(const float* vector, int64_t count, bool writable) {
  if (vector) model::allow(vector, 4 * count, writable);
}
void allow(const Vector& vector, int64_t count) {
  if (vector.data) model::allow(vector.data, count * (vector.dtype == Dtype::float32 ? 4 : 2), false);
}

void begin(const Layer& l, const model::Options* options) {
  model::set_options(*options);
  model::clear_ranges();
  allow(l.weight, l.n, l.k, false);
  allow(l.u, l.n, false);
  allow(l.v, l.groups * l.k, false);
}

}  // namespace
}  // namespace rlrr
