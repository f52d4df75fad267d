// Descriptions of matrices for the copy engine.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../problem.h"

namespace rlrr::hopper {

// Whether the copy engine can load boxes of it: row-major, 16-byte base and rows.
bool fits_boxes(const Matrix& matrix, int64_t rows, int64_t cols);

// Whether this path can serve the frozen layer at all, with x or dy of `dtype`: a 16-bit W of the same
// dtype, N and K of whole 16-byte chunks, and the GPU it was written for.
bool fits_layer(const Layer& layer, Dtype dtype);

// Boxes of `box_rows` x 64 in the 128-byte swizzle, zeros outside the matrix. 16-bit matrices only.
cudaError_t describe(CUtensorMap& map, const Matrix& matrix, int64_t rows, int64_t cols, int box_rows);

// Boxes of 1 x 64 of a contiguous float32 matrix, as it lies.
cudaError_t describe(CUtensorMap& map, const float* rows_of_scales, int64_t rows, int64_t cols);

}  // namespace rlrr::hopper
