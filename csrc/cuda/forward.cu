// y = x W'^T + bias + shift with W' = W * (1 + u v) formed between shared memory and tensor cores.
#include "epilogue.cuh"
#include "launch.h"
#include "plan.cuh"
#include "product.cuh"

namespace rlrr {
namespace {

struct Parameters {
  Source x, weight;
  const float *u, *v;
  Vector bias, shift;
  void* y;
  int64_t y_stride;
  int m, n, k, group_rows, group_tiles, groups;
};

template <class Math, class Staged, class Tile>
RLRR_KERNEL forward_kernel(RLRR_PARAMETER Parameters p) {
  // n runs fastest: the blocks in flight share a few row bands of x and all of W, which fits in L2
  const int n_tiles = p.groups * p.group_tiles;
  const int m_start = ptx::block() / n_tiles * Tile::kRows;
  const int n_tile = ptx::block() % n_tiles;
  // tiles are laid out group by group, so that a tile meets one v
  const int group = n_tile / p.group_tiles;
  const int in_group = n_tile % p.group_tiles * Tile::kCols;
  const int n_start = group * p.group_rows + in_group;

  Product product;
  product.left = p.x;
  product.weight = p.weight;
  product.depth_scale = p.v + static_cast<int64_t>(group) * p.k;
  product.feature_scale = p.u + n_start;
  product.feature_scale_stride = 0;
  product.segment = p.k;
  product.segments = 1;
  product.token = m_start;
  product.tokens = p.m - m_start;
  product.feature = n_start;
  product.features = p.group_rows - in_group;

  typename Tile::Accumulator acc;
  Tile::clear(acc);
  accumulate<Math, Staged, Inner::depth, Tile>(acc, product);

  using Element = typename Math::Element;
  Element* y = static_cast<Element*>(p.y) + m_start * p.y_stride + n_start;
  store_tile<Tile>(acc, y, p.y_stride, product.tokens, product.features, [&](int col) {
    const float bias = p.bias.data ? load_float(p.bias.data, n_start + col, p.bias.dtype) : 0.0f;
    return bias + (p.shift.data ? load_float(p.shift.data, n_start + col, p.shift.dtype) : 0.0f);
  });
}

template <class Math, class Staged, class Tile>
cudaError_t launch(const Forward& f, cudaStream_t stream) {
  const Layer& l = f.layer;
  const int64_t group_rows = l.n / l.groups, group_tiles = ceil_div(group_rows, Tile::kCols);
  const Parameters p{
      source(f.x, Tile::kDepth, kDtype<typename Math::Element>),
      source(l.weight, Tile::kDepth, kDtype<Staged>),
      l.u,
      l.v,
      f.bias,
      f.shift,
      f.y.data,
      f.y.row_stride,
      static_cast<int>(l.m),
      static_cast<int>(l.n),
      static_cast<int>(l.k),
      static_cast<int>(group_rows),
      static_cast<int>(group_tiles),
      static_cast<int>(l.groups),
  };
  using Stage = ProductStage<Math, Staged, Inner::depth, Tile>;
  static_assert(Stage::kTotalBytes <= kMostSharedBytes);
  return ptx::launch<forward_kernel<Math, Staged, Tile>>(ceil_div(l.m, Tile::kRows) * l.groups * group_tiles,
                                                         Stage::kTotalBytes, stream, p);
}

}  // namespace

cudaError_t forward(const Forward& f, cudaStream_t stream) {
  const Layer& l = f.layer;
  const auto tiles = [&](int64_t rows, int64_t cols) {
    return ceil_div(l.m, rows) * l.groups * ceil_div(l.n / l.groups, cols);
  };
  return with_product_plan(l, f.x.dtype, tiles, [&](auto math, auto staged, auto tile) {
    return launch<decltype(math), decltype(staged), decltype(tile)>(f, stream);
  });
}

}  // namespace rlrr
