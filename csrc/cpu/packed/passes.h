// The passes by kernels of our own: W' goes straight into the order in which it is multiplied.
//
// A BLAS would copy each panel of W' once more into that order, and x again for each panel. One table for each set
// of instructions and compute type; contracts as in ../passes.h, with offsets, du and dv in float32.
#pragma once

#include "../passes.h"

namespace rlrr::packed {

struct Passes {
  int64_t (*scratch_bytes)(Pass pass, const Matrix& rows, const Layer& layer, int64_t threads);
  void (*forward)(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch);
  void (*grad_input)(const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch);
  void (*grad_scales)(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv,
                      const Scratch& scratch);
};

extern const Passes avx2_float32, avx2_bfloat16;      // need avx2, fma
extern const Passes avx512_float32, avx512_bfloat16;  // need avx512f, bw, vl, dq
extern const Passes avx512_bfloat16_pairs;            // needs avx512_bf16 as well
extern const Passes amx_bfloat16;                     // needs amx_tile, amx_bf16 as well

}  // namespace rlrr::packed
