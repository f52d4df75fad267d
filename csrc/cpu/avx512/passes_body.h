// The table of one compute type.
#pragma once

#include "gram.h"
#include "linear.h"
#include "passes.h"

namespace rlrr {
namespace {

// body(W{}) for W's dtype
template <class F>
void with_weight(const Layer& layer, const F& body) {
  layer.weight.dtype == Dtype::float32 ? body(float{}) : body(bfloat16{});
}

template <class Unit>
constexpr avx512::Passes passes_of = {
    [](const Matrix& x, const Layer& layer, const float* offset, const Matrix& y, void* scratch, int64_t threads) {
      with_weight(layer, [&](auto w) {
        const auto pack = [&](int64_t n, Word* to) { pack_rescaled_rows<Unit, decltype(w)>(layer, n, to); };
        multiply_by_rescaled<Unit>(x, offset, y, pack, static_cast<Word*>(scratch), threads);
      });
    },
    [](const Matrix& dy, const Layer& layer, const Matrix& dx, void* scratch, int64_t threads) {
      with_weight(layer, [&](auto w) {
        const auto pack = [&](int64_t k, Word* to) { pack_rescaled_cols<Unit, decltype(w)>(layer, k, to); };
        multiply_by_rescaled<Unit>(dy, nullptr, dx, pack, static_cast<Word*>(scratch), threads);
      });
    },
    [](const Matrix& dy, const Matrix& x, const Layer& layer, float* du, float* dv, void* scratch, int64_t bytes) {
      with_weight(layer, [&](auto w) { reduce_gram<Unit, decltype(w)>(dy, x, layer, du, dv, scratch, bytes); });
    },
};

}  // namespace
}  // namespace rlrr
