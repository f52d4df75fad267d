// The passes through BLAS, for float64 and for CPUs without AVX2: a panel of W' or of G at a time, in a scratch that
// stays in cache; and df, for all dtypes and CPUs.
#include <algorithm>
#include <vector>

#include "loops.h"
#include "passes.h"
#include "runtime.h"

namespace rlrr {
namespace {

// Elements that a product with the rank of a panel's rows or columns takes: only ranks above 1 have one
int64_t rank_sums(const Layer& layer) { return layer.rank == 1 ? 0 : layer.rank * std::max(layer.n(), layer.k()); }

// About a twentieth of what the formula in PyTorch holds for the same sizes, and a few MB at most. A BLAS copies its
// operands for each panel, so that wide panels pay if there are many tokens.
int64_t scratch_bytes(Pass pass, const Matrix& rows, const Layer& layer, int64_t) {
  // the formula holds three copies of W's size in the type of the sums, besides x and y
  const int64_t n = layer.n(), k = layer.k(), formula = wide_size(rows.dtype) * (3 * n * k + rows.rows * (n + k));
  // a panel must hold a few rows, or columns, however long they are
  const int64_t panels = std::max(std::clamp<int64_t>(formula / 21, 64 << 10, 4 << 20), 16 * 8 * std::max(n, k));
  return panels + (pass == Pass::grad_scales ? rank_sums(layer) * wide_size(rows.dtype) : 0);
}

// u [rows, rank] and v [rank, cols] of some rows of one group, and of some columns
template <class A>
Matrix scale_out_block(const Layer& layer, int64_t row, int64_t rows) {
  return {
      const_cast<A*>(static_cast<const A*>(layer.u)) + row * layer.rank, rows, layer.rank, layer.rank, 1, dtype_of<A>};
}
template <class A>
Matrix scale_in_block(const Layer& layer, int64_t row, int64_t col, int64_t cols) {
  const int64_t first = layer.group_of(row) * layer.rank * layer.k() + col;
  return {const_cast<A*>(static_cast<const A*>(layer.v)) + first, layer.rank, cols, layer.k(), 1, dtype_of<A>};
}

// u v of some rows and columns
template <class A>
void multiply_scales(const Layer& layer, int64_t row, int64_t rows, int64_t col, int64_t cols, A* scales) {
  const int64_t group_rows = layer.n() / layer.groups;
  for (int64_t first = row, end = row; first < row + rows; first = end) {
    end = std::min((layer.group_of(first) + 1) * group_rows, row + rows);
    matmul(scale_out_block<A>(layer, first, end - first), scale_in_block<A>(layer, first, col, cols),
           {scales + (first - row) * cols, end - first, cols, cols, 1, dtype_of<A>});
  }
}

// How many of `count` rows or columns of `length` elements a panel in the scratch has. With ranks above 1 their scales
// follow it, aligned.
int64_t panel_lines(const Layer& layer, Dtype dtype, const Scratch& scratch, int64_t length, int64_t count) {
  const int64_t scale = layer.rank == 1 ? 0 : wide_size(dtype);
  return std::clamp<int64_t>((scratch.bytes - scale) / (length * (element_size(dtype) + scale)), 1, count);
}

// Where the scales of a panel begin
template <class A, class T>
A* scales_after(T* panel, int64_t elements) {
  return reinterpret_cast<A*>(panel) + (elements * int64_t{sizeof(T)} + int64_t{sizeof(A)} - 1) / int64_t{sizeof(A)};
}

// W' of some rows and columns, as a row-major panel
template <class T, class W>
void rescale_panel(const Layer& layer, int64_t row, int64_t rows, int64_t col, int64_t cols, T* panel) {
  using A = Wide<T>;
  const A *u = static_cast<const A*>(layer.u), *v = static_cast<const A*>(layer.v);
  const auto rescale = rescale_row(T{}, W{});
  if (layer.rank > 1) {
    A* scales = scales_after<A>(panel, rows * cols);
    multiply_scales<A>(layer, row, rows, col, cols, scales);
    parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      ContiguousRow<W> weight_row(layer.weight);
      for (int64_t i = begin; i < end; ++i) {
        rescale(weight_row(row + i, col, cols), A{1}, scales + i * cols, cols, panel + i * cols);
      }
    });
    return;
  }
  parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    ContiguousRow<W> weight_row(layer.weight);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = row + i;
      rescale(weight_row(n, col, cols), u[n], v + layer.group_of(n) * layer.k() + col, cols, panel + i * cols);
    }
  });
}

Matrix rescaled_panel(const Layer& layer, int64_t row, int64_t rows, int64_t col, int64_t cols, Dtype dtype,
                      const Scratch& scratch) {
  dispatch(dtype, layer.weight.dtype, [&](auto t, auto w) {
    using T = decltype(t);
    rescale_panel<T, decltype(w)>(layer, row, rows, col, cols, static_cast<T*>(scratch.data));
  });
  return {scratch.data, rows, cols, cols, 1, dtype};
}

void forward(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch) {
  const int64_t n = layer.n(), k = layer.k();
  std::vector<bfloat16> narrowed;  // BLAS takes an offset in the dtype of x
  if (offset != nullptr && x.dtype == Dtype::bfloat16) {
    const float* wide = static_cast<const float*>(offset);
    narrowed.resize(n);
    std::transform(wide, wide + n, narrowed.begin(), narrow<bfloat16>);
    offset = narrowed.data();
  }
  const int64_t rows = panel_lines(layer, x.dtype, scratch, k, n);
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t count = std::min(rows, n - first);
    const Matrix panel = rescaled_panel(layer, first, count, 0, k, x.dtype, scratch);
    const char* part = static_cast<const char*>(offset);
    linear(x, panel, part ? part + first * element_size(x.dtype) : nullptr, y.block(0, y.rows, first, count));
  }
}

void grad_input(const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch) {
  const int64_t n = layer.n(), k = layer.k();
  // panels of columns: with panels of rows dx would be a sum of several products, each of them rounded in bfloat16
  const int64_t cols = panel_lines(layer, dy.dtype, scratch, n, k);
  for (int64_t first = 0; first < k; first += cols) {
    const int64_t count = std::min(cols, k - first);
    matmul(dy, rescaled_panel(layer, 0, n, first, count, dy.dtype, scratch), dx.block(0, dx.rows, first, count));
  }
}

// Rows of G that share a partial sum of dv: few enough that float32 sums stay accurate. The number does not depend on
// the number of threads, so that results do not either.
constexpr int64_t chunk_rows = 32;
// Columns that are summed at a time, for the same reason
constexpr int64_t stretch = 512;

// Adds to du and dv what some rows of one group give, from their panel of G [count, K]
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

// As reduce_panel, for ranks above 1: P replaces G, and BLAS multiplies it. `part` has room for rank_sums.
template <class A, class W>
void reduce_panel_by_rank(const Layer& layer, int64_t first, int64_t count, A* panel, A* du, A* dv, A* part) {
  const int64_t k = layer.k(), rank = layer.rank;
  const auto multiply = multiply_row(A{}, W{});
  parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
    ContiguousRow<W> weight_row(layer.weight);
    for (int64_t i = begin; i < end; ++i) multiply(weight_row(first + i, 0, k), k, panel + i * k);
  });
  const Matrix p{panel, count, k, k, 1, dtype_of<A>};
  matmul(p, scale_in_block<A>(layer, first, 0, k).transposed(), {part, count, rank, rank, 1, dtype_of<A>});
  for (int64_t i = 0; i < count * rank; ++i) du[first * rank + i] += part[i];
  matmul(scale_out_block<A>(layer, first, count).transposed(), p, {part, rank, k, k, 1, dtype_of<A>});
  dv += layer.group_of(first) * rank * k;
  for (int64_t i = 0; i < rank * k; ++i) dv[i] += part[i];
}

// Converts a block of bfloat16 to float32
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

// Computes a panel of rows of G at a time. bfloat16 is converted to float32 first, in blocks of tokens: BLAS would
// round G to bfloat16, and du and dv are float32. They are linear in G, so that each block can be reduced at once.
template <class T, class W>
void by_panels(const Matrix& dy, const Matrix& x, const Layer& layer, Wide<T>* du, Wide<T>* dv,
               const Scratch& scratch) {
  using A = Wide<T>;
  const int64_t one = layer.rank == 1;
  std::vector<double> du_total(one * layer.n()), dv_total(one * layer.groups * layer.k());
  constexpr bool widened = sizeof(T) != sizeof(A);
  const int64_t k = layer.k(), m = x.rows, group_rows = layer.n() / layer.groups;
  const int64_t floats = scratch.bytes / int64_t{sizeof(A)} - rank_sums(layer);
  // a row of the panel takes K for G, and K / 32 for its part of a partial dv; one more partial dv is reserved
  const int64_t rows = std::clamp<int64_t>((floats / (widened ? 2 : 1) - k) * 32 / (33 * k), 1, group_rows);
  A* panel = static_cast<A*>(scratch.data);
  A* partial = panel + rows * k;
  A* rest = partial + (rows + chunk_rows - 1) / chunk_rows * k;
  const int64_t tokens = widened ? std::clamp<int64_t>((floats - (rest - panel)) / (k + rows), 1, m) : m;

  if (layer.rank > 1) {
    std::fill_n(du, layer.n() * layer.rank, A{0});
    std::fill_n(dv, layer.groups * layer.rank * k, A{0});
  }
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
        if (layer.rank > 1) {
          reduce_panel_by_rank<A, W>(layer, first, count, panel, du, dv, panel + floats);
        } else {
          reduce_panel<A, W>(layer, first, count, panel, du_total.data(), dv_total.data(), partial);
        }
      }
    }
  }
  if (layer.rank > 1) return;
  std::copy(du_total.begin(), du_total.end(), du);
  std::copy(dv_total.begin(), dv_total.end(), dv);
}

void grad_scales(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, const Scratch& scratch) {
  dispatch(x.dtype, layer.weight.dtype, [&](auto t, auto w) {
    using A = Wide<decltype(t)>;
    by_panels<decltype(t), decltype(w)>(dy, x, layer, static_cast<A*>(du), static_cast<A*>(dv), scratch);
  });
}

// Tokens that are summed in Wide<T> before they are added to the total: long float32 sums lose digits
constexpr int64_t block_tokens = 128;
// Columns that a thread sums at a time: their sums stay in the L1 cache
constexpr int64_t block_cols = 512;

template <class T>
void sum(const Matrix& dy, Wide<T>* df) {
  const auto add = add_row(T{});
  const int64_t blocks = (dy.cols + block_cols - 1) / block_cols;
  const int64_t workers = useful_threads(8 * dy.rows * dy.cols, thread_count());  // loads take the time
  share(blocks, workers, [&](int64_t b, int64_t) {
    ContiguousRow<T> row(dy);
    Wide<T> part[block_cols];
    double total[block_cols];
    const int64_t col = b * block_cols, count = std::min(block_cols, dy.cols - col);
    std::fill_n(total, count, 0.0);
    for (int64_t first = 0; first < dy.rows; first += block_tokens) {
      std::fill_n(part, count, Wide<T>{0});
      const int64_t last = std::min(first + block_tokens, dy.rows);
      for (int64_t m = first; m < last; ++m) add(row(m, col, count), count, part);
      for (int64_t i = 0; i < count; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < count; ++i) df[col + i] = static_cast<Wide<T>>(total[i]);
  });
}

}  // namespace

const Passes blas_passes = {scratch_bytes, forward, grad_input, grad_scales};

void sum_tokens(const Matrix& dy, void* df) {
  dispatch(dy.dtype, dy.dtype, [&](auto t, auto) { sum<decltype(t)>(dy, static_cast<Wide<decltype(t)>*>(df)); });
}

}  // namespace rlrr
