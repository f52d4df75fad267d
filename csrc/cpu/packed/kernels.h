// The passes for a unit type. The macros of vectors.h select the instruction set.
#pragma once

#include "../passes.h"
#include "gram_rank.h"
#include "linear.h"

namespace rlrr {
namespace {

// Calls body(W{}, ranked) with the type of W and, as a type, whether the rank is 2 or more.
template <class F>
void with_weight(const Layer& layer, const F& body) {
  const auto with_rank = [&](auto w) { layer.rank == 1 ? body(w, std::false_type{}) : body(w, std::true_type{}); };
  layer.weight.dtype == Dtype::float32 ? with_rank(float{}) : with_rank(bfloat16{});
}

template <class Unit>
constexpr Passes passes_of = {
    [](Pass pass, const Matrix& rows, const Layer& layer, int64_t threads) {
      if (pass != Pass::grad_scales) return linear_scratch_bytes<Unit>(rows, layer, threads);
      return layer.rank == 1 ? gram_scratch_bytes<Unit>(rows, layer, threads)
                             : gram_rank_scratch_bytes<Unit>(rows, layer, threads);
    },
    [](const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch) {
      with_weight(layer, [&](auto w, auto ranked) {
        multiply_by_rescaled<Unit>(x, static_cast<const float*>(offset), y,
                                   pack_rescaled_rows<Unit, decltype(w), ranked>, layer, scratch);
      });
    },
    [](const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch) {
      with_weight(layer, [&](auto w, auto ranked) {
        multiply_by_rescaled<Unit>(dy, nullptr, dx, pack_rescaled_cols<Unit, decltype(w), ranked>, layer, scratch);
      });
    },
    [](const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, const Scratch& scratch) {
      with_weight(layer, [&](auto w, auto ranked) {
        constexpr auto reduce = ranked ? reduce_gram_rank<Unit, decltype(w)> : reduce_gram<Unit, decltype(w)>;
        reduce(dy, x, layer, static_cast<float*>(du), static_cast<float*>(dv), scratch);
      });
    },
};

}  // namespace
}  // namespace rlrr
