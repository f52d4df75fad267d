// What the host decides before a launch: how matrices can be read, the tile, the splits and the arithmetic.
#pragma once

#include "math.cuh"

namespace rlrr {

// Available to a block on every GPU from sm_80 on; sm_86, sm_89 and sm_120 have no more.
constexpr int kMostSharedBytes = 99 * 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// `first_col`: tiles start at columns that are multiples of it, besides multiples of their width. `staged`: the dtype
// in shared memory; asynchronous copies cannot convert.
inline Source source(const Matrix& matrix, int64_t first_col, Dtype staged) {
  const int bytes = size_of(matrix.dtype);
  const bool vectors = matrix.dtype == staged && matrix.col_stride == 1 && matrix.row_stride * bytes % 16 == 0 &&
                       first_col * bytes % 16 == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
  return {static_cast<const char*>(matrix.data), matrix.row_stride, matrix.col_stride, matrix.dtype, vectors};
}

// Indices of rows, columns and blocks are 32-bit in the kernels; offsets into matrices are 64-bit.
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

// W is staged in shared memory as it is if it has the dtype of x, else in float32.
template <class Math, class Run>
cudaError_t with_staged(Math math, Dtype weight, const Run& run) {
  using Element = typename Math::Element;
  if constexpr (sizeof(Element) == 2) {
    if (weight == kDtype<Element>) return run(math, Element{});
  }
  return run(math, float{});
}

// 64 bytes of depth a row.
template <class Math>
constexpr int kProductDepth = 64 / sizeof(typename Math::Element);

// Plain float32 holds four depths of its right operand at once, which leaves registers for half the columns.
template <class Math>
using LargeProductTile = Tile<128, Math::kTensorCores ? 128 : 64, kProductDepth<Math>, 1, 4, 3>;
template <class Math>
using SmallProductTile = Tile<64, 64, kProductDepth<Math>, 1, 4, 3>;

// The size of a product: a result of rows x (col_groups * cols), whose tiles cross no group, and a depth of `segments`
// segments, whose steps cross no segment.
struct Extent {
  int64_t rows, col_groups, cols, segments, segment;
};

// The tile, and the number of blocks that share the steps of a tile.
struct ProductPlan {
  bool large;
  int64_t splits, split_steps;
};

// The most bytes of partial sums; it limits the number of splits.
constexpr int64_t kSplitBytes = 1'900'000;

// Estimates, none of them measured: the cycles that a block takes besides its steps, the cycles that a second kernel
// adds, and the bytes that L2 moves in a cycle.
constexpr double kBlockCycles = 1000, kSecondKernelCycles = 2500, kL2BytesPerCycle = 2048;

// Multiply-adds of a multiprocessor in a cycle, as on sm_80.
template <class Math>
constexpr double kRate = Math::kTensorCores ? 2048 / sizeof(typename Math::Element) : 128;

// A small tile reaches an estimated 0.6 of the rate of the large one: it loads more for each product, and rescales each
// value of W for half as many tokens.
template <class Math, class Tile>
void consider(const Extent& e, const Device& device, bool large, double& least, ProductPlan& best) {
  const double step_cycles = Tile::kRows * Tile::kCols * Tile::kDepth / kRate<Math> / (large ? 1.0 : 0.6);
  const int64_t tiles = ceil_div(e.rows, Tile::kRows) * e.col_groups * ceil_div(e.cols, Tile::kCols);
  const int64_t steps = ceil_div(e.segment, Tile::kDepth) * e.segments;
  const int64_t bytes = 4 * e.rows * e.col_groups * e.cols;
  // more blocks than multiprocessors would only wait
  int64_t most = device.multiprocessors / tiles;
  if (most > kSplitBytes / bytes) most = kSplitBytes / bytes;
  if (most > steps) most = steps;
  for (int64_t wanted = 1; wanted == 1 || wanted <= most; ++wanted) {
    const int64_t split_steps = ceil_div(steps, wanted), splits = ceil_div(steps, split_steps);
    double cycles = ceil_div(tiles * splits, device.multiprocessors) * (kBlockCycles + split_steps * step_cycles);
    if (splits > 1) cycles += kSecondKernelCycles + 2 * splits * bytes / kL2BytesPerCycle;
    if (cycles >= least) continue;
    least = cycles;
    best = {large, splits, split_steps};
  }
}

template <class Math>
ProductPlan product_plan(const Extent& extent, const Device& device) {
  ProductPlan best;
  double least = 1e300;
  consider<Math, LargeProductTile<Math>>(extent, device, true, least, best);
  consider<Math, SmallProductTile<Math>>(extent, device, false, least, best);
  return best;
}

// Calls run(math, staged, tile, plan) for a product in x's dtype.
template <class Run>
cudaError_t with_product_plan(const Layer& layer, Dtype dtype, const Extent& extent, const Run& run) {
  if (!fits(layer)) return cudaErrorInvalidValue;
  return with_math(dtype, layer.tf32, [&](auto math) {
    using Math = decltype(math);
    const ProductPlan plan = product_plan<Math>(extent, layer.device);
    return with_staged(math, layer.weight.dtype, [&](auto math, auto staged) {
      return plan.large ? run(math, staged, LargeProductTile<Math>{}, plan)
                        : run(math, staged, SmallProductTile<Math>{}, plan);
    });
  });
}

// The number of partial sums of a product; 0 if its depth is not split.
inline int64_t split_floats(const Layer& layer, Dtype dtype, const Extent& extent) {
  if (!fits(layer)) return 0;
  int64_t splits = 1;
  with_math(dtype, layer.tf32, [&](auto math) {
    splits = product_plan<decltype(math)>(extent, layer.device).splits;
    return cudaSuccess;
  });
  return splits > 1 ? splits * extent.rows * extent.col_groups * extent.cols : 0;
}

}  // namespace rlrr
