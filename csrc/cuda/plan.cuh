// What the host decides before a launch: how a matrix may be read, which tile, which arithmetic.
#pragma once

#include "copy.cuh"
#include <cuda_runtime_api.h>

#include "math.cuh"

namespace rlrr {

// A block's share on the smallest of these GPUs (sm_86, sm_89, sm_120): no tile needs a fallback.
constexpr int kMostSharedBytes = 99 * 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// `first_col`: tiles start at multiples of it, besides those of their own width. `staged`: the dtype
// in shared memory; copies cannot convert.
inline Source source(const Matrix& matrix, int64_t first_col, Dtype staged) {
  const int bytes = size_of(matrix.dtype);
  const bool vectors = matrix.dtype == staged && matrix.col_stride == 1 && matrix.row_stride * bytes % 16 == 0 &&
                       first_col * bytes % 16 == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
  return {static_cast<const char*>(matrix.data), matrix.row_stride, matrix.col_stride, matrix.dtype, vectors};
}

// Positions inside a matrix are 32-bit in the kernels, and so are grids; offsets into it are not.
inline bool fits(const Layer& layer) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1024;
  return layer.m > 0 && layer.n > 0 && layer.k > 0 && layer.groups > 0 && layer.n % layer.groups == 0 &&
         layer.m <= kMost && layer.n <= kMost && layer.k <= kMost;
}

// Calls run(math) with the arithmetic of x's dtype.
template <class Run>
cudaError_t with_math(Dtype dtype, bool tf32, const Run& run) {
  if (dtype == Dtype::bfloat16) return run(HalfMath<bf16>{});
  if (dtype == Dtype::float16) return run(HalfMath<fp16>{});
  return tf32 ? run(Tf32Math{}) : run(PlainMath{});
}

// W is staged in x's dtype where that copies its bits, else in float32.
template <class Math, class Run>
cudaError_t with_staged(Math math, Dtype weight, const Run& run) {
  using Element = typename Math::Element;
  if constexpr (sizeof(Element) == 2) {
    if (weight == kDtype<Element>) return run(math, Element{});
  }
  return run(math, float{});
}

// Rows of a tile take 64 bytes of depth.
template <class Math>
constexpr int kProductDepth = 64 / sizeof(typename Math::Element);

// Plain float32 holds four depths of its right operand at once, which leaves room for half the columns.
template <class Math>
using LargeProductTile = Tile<128, Math::kTensorCores ? 128 : 64, kProductDepth<Math>, 1, 4, 3>;
template <class Math>
using SmallProductTile = Tile<64, 64, kProductDepth<Math>, 1, 4, 3>;

// The large tile unless it leaves multiprocessors idle for longer than its better use of them gains.
// A small one works at an estimated 0.6 of its rate: it loads more a product, and rescales each value
// of W for half as many tokens. `tiles(rows, cols)` counts the tiles of a size.
template <class Large, class Small, class Tiles>
bool prefer_large(const Tiles& tiles, const Device& device) {
  const auto cost = [&](int64_t rows, int64_t cols) {
    return static_cast<double>(ceil_div(tiles(rows, cols), device.multiprocessors) * rows * cols);
  };
  return cost(Large::kRows, Large::kCols) <= cost(Small::kRows, Small::kCols) / 0.6;
}

// Calls run(math, staged, tile) with what suits a product of x's dtype over `tiles`.
template <class Tiles, class Run>
cudaError_t with_product_plan(const Layer& layer, Dtype dtype, const Tiles& tiles, const Run& run) {
  if (!fits(layer)) return cudaErrorInvalidValue;
  return with_math(dtype, layer.tf32, [&](auto math) {
    return with_staged(math, layer.weight.dtype, [&](auto math, auto staged) {
      using Large = LargeProductTile<decltype(math)>;
      using Small = SmallProductTile<decltype(math)>;
      return prefer_large<Large, Small>(tiles, layer.device) ? run(math, staged, Large{}) : run(math, staged, Small{});
    });
  });
}

}  // namespace rlrr
