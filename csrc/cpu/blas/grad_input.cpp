#include <algorithm>

#include "../dispatch.h"
#include "../loops.h"
#include "passes.h"
#include "../rows.h"
#include "../runtime.h"

namespace rlrr::blas {

namespace {

// W' of all rows and some columns, row-major
template <class T, class W>
void rescale_cols(const Layer& layer, int64_t first, int64_t count, T* panel) {
  using A = Wide<T>;
  const A *u = static_cast<const A*>(layer.u), *v = static_cast<const A*>(layer.v);
  const auto rescale = rescale_row(T{}, W{});
  parallel_for(0, layer.n(), 64, [&](int64_t begin, int64_t end) {
    ContiguousRow<W> weight_row(layer.weight);
    for (int64_t n = begin; n < end; ++n) {
      rescale(weight_row(n, first, count), u[n], v + layer.group_of(n) * layer.k() + first, count, panel + n * count);
    }
  });
}

}  // namespace

void grad_input(const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch) {
  const int64_t n = layer.n(), k = layer.k();
  // panels of columns: a panel of rows would add to dx several times, and round each time in bfloat16
  const int64_t cols = std::clamp<int64_t>(scratch.bytes / (n * element_size(dy.dtype)), 1, k);
  for (int64_t first = 0; first < k; first += cols) {
    const int64_t count = std::min(cols, k - first);
    dispatch(dy.dtype, layer.weight.dtype, [&](auto t, auto w) {
      rescale_cols<decltype(t), decltype(w)>(layer, first, count, static_cast<decltype(t)*>(scratch.data));
    });
    matmul(dy, {scratch.data, n, count, count, 1, dy.dtype}, dx.block(0, dx.rows, first, count));
  }
}

}  // namespace rlrr::blas
