#include <algorithm>
#include <vector>

#include "../dispatch.h"
#include "../loops.h"
#include "passes.h"
#include "../rows.h"
#include "../runtime.h"

namespace rlrr::blas {

namespace {

// W' of some rows, all of K, row-major
template <class T, class W>
void rescale_rows(const Layer& layer, int64_t first, int64_t count, T* panel) {
  using A = Wide<T>;
  const int64_t k = layer.k();
  const A *u = static_cast<const A*>(layer.u), *v = static_cast<const A*>(layer.v);
  const auto rescale = rescale_row(T{}, W{});
  parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    ContiguousRow<W> weight_row(layer.weight);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = first + i;
      rescale(weight_row(n, 0, k), u[n], v + layer.group_of(n) * k, k, panel + i * k);
    }
  });
}

}  // namespace

int64_t scratch_bytes(const Matrix& rows, const Layer& layer) {
  // the formula holds three copies of W's size in the type of the sums, besides x and y
  const int64_t n = layer.n(), k = layer.k(), formula = wide_size(rows.dtype) * (3 * n * k + rows.rows * (n + k));
  // a panel must hold a few rows, or columns, however long they are
  return std::max(std::clamp<int64_t>(formula / 21, 64 << 10, 4 << 20), 16 * 8 * std::max(n, k));
}

void forward(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch) {
  const int64_t n = layer.n(), k = layer.k();
  std::vector<bfloat16> narrowed;  // BLAS takes an offset in its own type
  if (offset != nullptr && x.dtype == Dtype::bfloat16) {
    const float* wide = static_cast<const float*>(offset);
    narrowed.resize(n);
    std::transform(wide, wide + n, narrowed.begin(), narrow<bfloat16>);
    offset = narrowed.data();
  }
  const int64_t rows = std::clamp<int64_t>(scratch.bytes / (k * element_size(x.dtype)), 1, n);
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t count = std::min(rows, n - first);
    dispatch(x.dtype, layer.weight.dtype, [&](auto t, auto w) {
      rescale_rows<decltype(t), decltype(w)>(layer, first, count, static_cast<decltype(t)*>(scratch.data));
    });
    const Matrix panel{scratch.data, count, k, k, 1, x.dtype};
    const char* part = static_cast<const char*>(offset);
    linear(x, panel, part ? part + first * element_size(x.dtype) : nullptr, y.block(0, y.rows, first, count));
  }
}

}  // namespace rlrr::blas
