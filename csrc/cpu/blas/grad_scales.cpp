#include <algorithm>
#include <vector>

#include "../dispatch.h"
#include "../loops.h"
#include "passes.h"
#include "../rows.h"
#include "../runtime.h"

namespace rlrr::blas {

namespace {

// Rows of G that share a partial sum of dv: few enough that float32 sums stay accurate, and a count that
// does not depend on the number of threads, so that results do not either.
constexpr int64_t chunk_rows = 32;
// Columns that are summed in one go, for the same reason
constexpr int64_t stretch = 512;

// du and dv of some rows of one group, from their panel of G [count, K]; adds to du and dv
template <class A, class W>
void reduce_panel(const Layer& layer, int64_t first, int64_t count, const A* panel, double* du, double* dv,
                  A* partial) {
  const int64_t k = layer.k(), chunks = (count + chunk_rows - 1) / chunk_rows;
  const A* u = static_cast<const A*>(layer.u);
  const A* v = static_cast<const A*>(layer.v) + layer.group_of(first) * k;
  const auto reduce = reduce_row(A{}, W{});
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    ContiguousRow<W> weight_row(layer.weight);
    for (int64_t c = begin; c < end; ++c) {
      A* sum = partial + c * k;
      std::fill_n(sum, k, A{0});
      for (int64_t i = c * chunk_rows; i < std::min(count, (c + 1) * chunk_rows); ++i) {
        const int64_t n = first + i;
        const W* w = weight_row(n, 0, k);
        for (int64_t col = 0; col < k; col += stretch) {
          du[n] += reduce(panel + i * k + col, w + col, u[n], v + col, std::min(stretch, k - col), sum + col);
        }
      }
    }
  });
  dv += layer.group_of(first) * k;
  for (int64_t c = 0; c < chunks; ++c) {
    for (int64_t i = 0; i < k; ++i) dv[i] += partial[c * k + i];
  }
}

// A block of bfloat16 as float32
void widen_block(const Matrix& from, float* to) {
  parallel_for(0, from.rows, 16, [&](int64_t begin, int64_t end) {
    ContiguousRow<bfloat16> row(from);
    for (int64_t i = begin; i < end; ++i) {
      float* out = to + i * from.cols;
      std::fill_n(out, from.cols, 0.0f);
      add_row(bfloat16{})(row(i, 0, from.cols), from.cols, out);
    }
  });
}

// By BLAS, a panel of rows of G at a time. bfloat16 is widened in blocks of tokens first: BLAS would round
// G to bfloat16, and du and dv are float32 results. They are linear in G, so a block can be reduced at once.
template <class T, class W>
void by_panels(const Matrix& dy, const Matrix& x, const Layer& layer, Wide<T>* du, Wide<T>* dv,
               const Scratch& scratch) {
  using A = Wide<T>;
  std::vector<double> du_total(layer.n()), dv_total(layer.groups * layer.k());
  constexpr bool widened = sizeof(T) != sizeof(A);
  const int64_t k = layer.k(), m = x.rows, group_rows = layer.n() / layer.groups;
  const int64_t floats = scratch.bytes / int64_t{sizeof(A)};
  // a row of the panel takes K for G, and a 32nd of K for its share of a partial dv; one partial is kept free
  const int64_t rows = std::clamp<int64_t>((floats / (widened ? 2 : 1) - k) * 32 / (33 * k), 1, group_rows);
  A* panel = static_cast<A*>(scratch.data);
  A* partial = panel + rows * k;
  A* rest = partial + (rows + chunk_rows - 1) / chunk_rows * k;
  const int64_t tokens = widened ? std::clamp<int64_t>((floats - (rest - panel)) / (k + rows), 1, m) : m;

  for (int64_t group = 0; group < layer.groups; ++group) {
    const int64_t group_end = (group + 1) * group_rows;
    for (int64_t first = group * group_rows; first < group_end; first += rows) {
      const int64_t count = std::min(rows, group_end - first);
      const Matrix g{panel, count, k, k, 1, dtype_of<A>};
      for (int64_t token = 0; token < m; token += tokens) {
        const int64_t block = std::min(tokens, m - token);
        Matrix dy_block = dy.block(token, block, first, count), x_block = x.block(token, block, 0, k);
        if constexpr (widened) {
          widen_block(x_block, rest);
          widen_block(dy_block, rest + block * k);
          x_block = {rest, block, k, k, 1, Dtype::float32};
          dy_block = {rest + block * k, block, count, count, 1, Dtype::float32};
        }
        matmul(dy_block.transposed(), x_block, g);
        reduce_panel<A, W>(layer, first, count, panel, du_total.data(), dv_total.data(), partial);
      }
    }
  }
  std::copy(du_total.begin(), du_total.end(), du);
  std::copy(dv_total.begin(), dv_total.end(), dv);
}

}  // namespace

void grad_scales(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, const Scratch& scratch) {
  dispatch(x.dtype, layer.weight.dtype, [&](auto t, auto w) {
    using A = Wide<decltype(t)>;
    by_panels<decltype(t), decltype(w)>(dy, x, layer, static_cast<A*>(du), static_cast<A*>(dv), scratch);
  });
}

}  // namespace rlrr::blas
