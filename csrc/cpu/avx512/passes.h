// The passes on CPUs with AVX-512, without BLAS: W' goes straight into the order in which it is multiplied.
//
// A BLAS would copy each panel of W' once more into that order, and x again for each panel. One table a
// compute type; contracts as in ../passes.h, with float32 offsets. A scratch of `scratch_bytes` is needed.
#pragma once

#include "../types.h"

namespace rlrr::avx512 {

struct Passes {
  void (*forward)(const Matrix& x, const Layer& layer, const float* offset, const Matrix& y, void* scratch,
                  int64_t threads);
  void (*grad_input)(const Matrix& dy, const Layer& layer, const Matrix& dx, void* scratch, int64_t threads);
  // adds to du and dv
  void (*grad_scales)(const Matrix& dy, const Matrix& x, const Layer& layer, float* du, float* dv, void* scratch,
                      int64_t bytes);
};

// Bytes for products whose sums run over `length` elements: a tile of W' and of the left operand a thread.
int64_t scratch_bytes(Dtype dtype, int64_t length, int64_t threads);

// Bytes for grad_scales: a twenty-fifth of the formula's three float32 copies of W, and what fits in a cache; but no
// less than a tile of columns of x and of dv's partial sums.
int64_t gram_scratch_bytes(const Matrix& x, const Layer& layer);

// Whether that tile stays in a core's second cache.
bool fits_cache(Dtype dtype, int64_t length);

extern const Passes float32_passes;   // needs avx512f, bw, vl, dq
extern const Passes bfloat16_passes;  // needs avx512_bf16 as well

}  // namespace rlrr::avx512
