// y = x W'^T + bias + shift, where W' = W * (1 + u v) exists in registers only.
#include "epilogue.cuh"
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
  float* partials;  // null if the depth is not split
  int m, n, k, group_rows, group_tiles, groups, m_tiles, steps, split_steps;
};

template <class Math, class Staged, class Tile>
RLRR_KERNEL(kBlocks<Math, Tile>)
forward_kernel(RLRR_PARAMETER Parameters p) {
  // n runs fastest: the blocks that run at a time share a few rows of tiles of x, and all of W, which fits in L2
  const int n_tiles = p.groups * p.group_tiles;
  const int m_start = ptx::block() / n_tiles % p.m_tiles * Tile::kRows;
  const int n_tile = ptx::block() % n_tiles;
  const int split = ptx::block() / n_tiles / p.m_tiles;
  // no tile crosses the end of a group, so that it needs a single v
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
  product.first_step = split * p.split_steps;
  product.steps = p.steps - product.first_step < p.split_steps ? p.steps - product.first_step : p.split_steps;
  product.token = m_start;
  product.tokens = p.m - m_start;
  product.feature = n_start;
  product.features = p.group_rows - in_group;

  typename Tile::Accumulator acc;
  Tile::clear(acc);
  accumulate<Math, Staged, Inner::depth, Tile>(acc, product);

  if (p.partials) {
    float* to = p.partials + (static_cast<int64_t>(split) * p.m + m_start) * p.n + n_start;
    return store_tile<Tile>(acc, to, p.n, product.tokens, product.features, [](int) { return 0.0f; });
  }
  using Element = typename Math::Element;
  Element* y = static_cast<Element*>(p.y) + m_start * p.y_stride + n_start;
  store_tile<Tile>(acc, y, p.y_stride, product.tokens, product.features,
                   [&](int col) { return column_term(p.bias, p.shift, n_start + col); });
}

template <class Math, class Staged, class Tile>
cudaError_t launch(const Forward& f, const ProductPlan& plan, cudaStream_t stream) {
  const Layer& l = f.layer;
  const int64_t group_rows = l.n / l.groups, group_tiles = ceil_div(group_rows, Tile::kCols);
  const int64_t m_tiles = ceil_div(l.m, Tile::kRows);
  using Element = typename Math::Element;
  const Parameters p{
      source(f.x, Tile::kDepth, kDtype<Element>),
      source(l.weight, Tile::kDepth, kDtype<Staged>),
      l.u,
      l.v,
      f.bias,
      f.shift,
      f.y.data,
      f.y.row_stride,
      plan.splits > 1 ? f.workspace : nullptr,
      static_cast<int>(l.m),
      static_cast<int>(l.n),
      static_cast<int>(l.k),
      static_cast<int>(group_rows),
      static_cast<int>(group_tiles),
      static_cast<int>(l.groups),
      static_cast<int>(m_tiles),
      static_cast<int>(ceil_div(l.k, Tile::kDepth)),
      static_cast<int>(plan.split_steps),
  };
  using Stage = ProductStage<Math, Staged, Inner::depth, Tile>;
  static_assert(Stage::kTotalBytes <= kMostSharedBytes);
  const cudaError_t error = ptx::launch<forward_kernel<Math, Staged, Tile>>(
      plan.splits * m_tiles * l.groups * group_tiles, Stage::kTotalBytes, stream, p);
  if (error != cudaSuccess || plan.splits == 1) return error;
  const SplitSums sums{f.workspace,           static_cast<int>(plan.splits), f.bias, f.shift, f.y.data, f.y.row_stride,
                       static_cast<int>(l.m), static_cast<int>(l.n)};
  return add_splits<Element>(sums, stream);
}

Extent extent(const Layer& l) { return {l.m, l.groups, l.groups > 0 ? l.n / l.groups : 0, 1, l.k}; }

}  // namespace

int64_t workspace_floats(const Forward& f) { return split_floats(f.layer, f.x.dtype, extent(f.layer)); }

cudaError_t forward(const Forward& f, cudaStream_t stream) {
  return with_product_plan(f.layer, f.x.dtype, extent(f.layer), [&](auto math, auto staged, auto tile, auto plan) {
    return launch<decltype(math), decltype(staged), decltype(tile)>(f, plan, stream);
  });
}

}  // namespace rlrr
