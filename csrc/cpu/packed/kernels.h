// The passes for a unit type. The macros of vectors.h select the instruction set.
#pragma once

#include "../passes.h"
#include "gram.h"
#include "linear.h"

namespace rlrr {
namespace {

// Calls body(W{}) with the type of W.
template <class F>
void with_weight(const Layer& layer, const F& body) {
  layer.weight.dtype == Dtype::float32 ? body(float{}) : body(bfloat16{});
}

template <class Unit>
constexpr Passes passes_of = {
    [](Pass pass, const Matrix& rows, const Layer& layer, int64_t threads) {
      return pass == Pass::grad_scales ? gram_scratch_bytes<Unit>(rows, layer, threads)
                                       : linear_scratch_bytes<Unit>(rows, layer, threads);
    },
    [](const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch) {
      with_weight(layer, [&](auto w) {
        multiply_by_rescaled<Unit>(x, static_cast<const float*>(offset), y, pack_rescaled_rows<Unit, decltype(w)>,
                                   layer, scratch);
      });
    },
    [](const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch) {
      with_weight(layer, [&](auto w) {
        multiply_by_rescaled<Unit>(dy, nullptr, dx, pack_rescaled_cols<Unit, decltype(w)>, layer, scratch);
      });
    },
    [](const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, const Scratch& scratch) {
      with_weight(layer, [&](auto w) {
        reduce_gram<Unit, decltype(w)>(dy, x, layer, static_cast<float*>(du), static_cast<float*>(dv), scratch);
      });
    },
};

}  // namespace
}  // namespace rlrr
