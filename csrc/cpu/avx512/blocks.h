// The sizes of tiles and blocks; no instruction set is needed to know them.
#pragma once

#include "../types.h"

namespace rlrr {

constexpr int64_t lanes = 16;
// 24 sums, 3 columns of operands and a broadcast row are 28 of the 32 registers
constexpr int64_t tile_rows = 8, vectors = 3, tile_cols = vectors * lanes;
// Units summed in one go: float32 sums of thousands of terms one after another lose two bits that a BLAS
// keeps. In grad_scales, where units are of tokens, a block of packed dy fits in the first cache.
constexpr int64_t max_units = 256;
// Rows of G that share a packed dy and a partial dv
constexpr int64_t task_rows = 32;

inline int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// No task crosses from one group into the next.
inline int64_t gram_tasks(const Layer& layer) { return layer.groups * up(layer.n() / layer.groups, task_rows); }

}  // namespace rlrr
