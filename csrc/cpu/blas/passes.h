// The passes by BLAS, on any CPU: a panel of W' or of G at a time, in a scratch that stays in cache.
//
// Contracts as in ../passes.h.
#pragma once

#include "../passes.h"

namespace rlrr::blas {

// About a twentieth of what the formula in PyTorch holds for the same sizes, and a few MB at most: a BLAS copies
// its operands for each panel anew, so that with many tokens wide panels pay. `rows` is x or dy.
int64_t scratch_bytes(const Matrix& rows, const Layer& layer);

void forward(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch);
void grad_input(const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch);
void grad_scales(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, const Scratch& scratch);

}  // namespace rlrr::blas
