// Tensor maps: the descriptions of matrices that the copy engine needs.
#pragma once

#include <cuda.h>

#include "../passes.h"

namespace rlrr::hopper {

// Whether the copy engine can load boxes of a matrix: row-major, start and rows aligned to 16 bytes.
bool fits_boxes(const Matrix& matrix, int64_t rows, int64_t cols);

// Whether this path supports the frozen layer with x or dy of `dtype`: W has the same 16-bit dtype, N and K are
// multiples of 8, and the compute capability is 9.0.
bool fits_layer(const Layer& layer, Dtype dtype);

// For boxes of `box_rows` x 64 of a 16-bit matrix, in the 128-byte swizzle, with zeros outside the matrix.
cudaError_t describe(CUtensorMap& map, const Matrix& matrix, int64_t rows, int64_t cols, int box_rows);

// For boxes of 1 x 64 of a contiguous float32 matrix, not swizzled.
cudaError_t describe(CUtensorMap& map, const float* rows_of_scales, int64_t rows, int64_t cols);

}  // namespace rlrr::hopper
