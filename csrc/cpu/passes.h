// The three passes on the CPU, none of which ever holds W' whole.
//
// x and dy [M, K] and [M, N] of one dtype T, any strides; W of T or, for 32- and 16-bit T, float32 or
// bfloat16; u, v, du, dv and df in Wide<T>. Outputs are contiguous in their last dimension.
#pragma once

#include "types.h"

namespace rlrr {

enum class Pass { forward, grad_input, grad_scales };

// Memory for a call, and how many threads it was measured for: their number may change meanwhile.
struct Scratch {
  void* data;
  int64_t bytes, threads;
};

// Bytes of scratch that a pass wants for this many threads; `rows` is x or dy.
int64_t scratch_bytes(Pass pass, const Matrix& rows, const Layer& layer, int64_t threads);

// y = x W'^T + offset; offset [N] in Wide<T>, or null
void forward(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch);

// dx = dy W'
void grad_input(const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch);

// du [N], dv [groups, K]
void grad_scales(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, const Scratch& scratch);

// df [N] = dy summed over the tokens
void sum_tokens(const Matrix& dy, void* df);

}  // namespace rlrr
