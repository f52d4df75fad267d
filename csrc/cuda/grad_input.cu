// dx = dy W', where W' = W * (1 + u v) exists in registers only.
#include "epilogue.cuh"
#include "plan.cuh"
#include "product.cuh"

namespace rlrr {
namespace {

struct Parameters {
  Source dy, weight;
  const float *u, *v;
  void* dx;
  int64_t dx_stride;
  float* partials;  // null if the depth is not split
  int m, k, k_tiles, group_rows, groups, m_tiles, steps, split_steps;
};

template <class Math, class Staged, class Tile>
RLRR_KERNEL(kBlocks<Math, Tile>)
grad_input_kernel(RLRR_PARAMETER Parameters p) {
  const int m_start = ptx::block() / p.k_tiles % p.m_tiles * Tile::kRows;
  const int k_start = ptx::block() % p.k_tiles * Tile::kCols;
  const int split = ptx::block() / p.k_tiles / p.m_tiles;

  // the sum over n goes through one group after another, each with a v of its own
  Product product;
  product.left = p.dy;
  product.weight = p.weight;
  product.depth_scale = p.u;
  product.feature_scale = p.v + k_start;
  product.feature_scale_stride = p.k;
  product.segment = p.group_rows;
  product.segments = p.groups;
  product.first_step = split * p.split_steps;
  product.steps = p.steps - product.first_step < p.split_steps ? p.steps - product.first_step : p.split_steps;
  product.token = m_start;
  product.tokens = p.m - m_start;
  product.feature = k_start;
  product.features = p.k - k_start;

  typename Tile::Accumulator acc;
  Tile::clear(acc);
  accumulate<Math, Staged, Inner::other, Tile>(acc, product);

  const auto no_term = [](int) { return 0.0f; };
  if (p.partials) {
    float* to = p.partials + (static_cast<int64_t>(split) * p.m + m_start) * p.k + k_start;
    return store_tile<Tile>(acc, to, p.k, product.tokens, product.features, no_term);
  }
  using Element = typename Math::Element;
  Element* dx = static_cast<Element*>(p.dx) + m_start * p.dx_stride + k_start;
  store_tile<Tile>(acc, dx, p.dx_stride, product.tokens, product.features, no_term);
}

template <class Math, class Staged, class Tile>
cudaError_t launch(const GradInput& g, const ProductPlan& plan, cudaStream_t stream) {
  const Layer& l = g.layer;
  const int64_t group_rows = l.n / l.groups, k_tiles = ceil_div(l.k, Tile::kCols);
  const int64_t m_tiles = ceil_div(l.m, Tile::kRows);
  using Element = typename Math::Element;
  const Parameters p{
      source(g.dy, l.groups == 1 ? Tile::kDepth : group_rows, kDtype<Element>),
      source(l.weight, Tile::kCols, kDtype<Staged>),
      l.u,
      l.v,
      g.dx.data,
      g.dx.row_stride,
      plan.splits > 1 ? g.workspace : nullptr,
      static_cast<int>(l.m),
      static_cast<int>(l.k),
      static_cast<int>(k_tiles),
      static_cast<int>(group_rows),
      static_cast<int>(l.groups),
      static_cast<int>(m_tiles),
      static_cast<int>(ceil_div(group_rows, Tile::kDepth) * l.groups),
      static_cast<int>(plan.split_steps),
  };
  using Stage = ProductStage<Math, Staged, Inner::other, Tile>;
  static_assert(Stage::kTotalBytes <= kMostSharedBytes);
  const cudaError_t error = ptx::launch<grad_input_kernel<Math, Staged, Tile>>(plan.splits * m_tiles * k_tiles,
                                                                               Stage::kTotalBytes, stream, p);
  if (error != cudaSuccess || plan.splits == 1) return error;
  const Vector none{nullptr, Dtype::float32};
  const SplitSums sums{g.workspace,           static_cast<int>(plan.splits), none, none, g.dx.data, g.dx.row_stride,
                       static_cast<int>(l.m), static_cast<int>(l.k)};
  return add_splits<Element>(sums, stream);
}

Extent extent(const Layer& l) { return {l.m, 1, l.k, l.groups, l.groups > 0 ? l.n / l.groups : 0}; }

}  // namespace

int64_t workspace_floats(const GradInput& g) { return split_floats(g.layer, g.dy.dtype, extent(g.layer)); }

cudaError_t grad_input(const GradInput& g, cudaStream_t stream) {
  return with_product_plan(g.layer, g.dy.dtype, extent(g.layer), [&](auto math, auto staged, auto tile, auto plan) {
    return launch<decltype(math), decltype(staged), decltype(tile)>(g, plan, stream);
  });
}

}  // namespace rlrr
