// dx = dy W' with W' = W * (1 + u v) formed between shared memory and tensor cores.
#include "epilogue.cuh"
#include "launch.h"
#include "plan.cuh"
#include "product.cuh"

namespace rlrr {
namespace {

struct Parameters {
  Source dy, weight;
  const float *u, *v;
  void* dx;
  int64_t dx_stride;
  int m, k, k_tiles, group_rows, groups;
};

template <class Math, class Staged, class Tile>
RLRR_KERNEL grad_input_kernel(RLRR_PARAMETER Parameters p) {
  const int m_start = ptx::block() / p.k_tiles * Tile::kRows;
  const int k_start = ptx::block() % p.k_tiles * Tile::kCols;

  // the sum over n walks the groups one after another, each with its v
  Product product;
  product.left = p.dy;
  product.weight = p.weight;
  product.depth_scale = p.u;
  product.feature_scale = p.v + k_start;
  product.feature_scale_stride = p.k;
  product.segment = p.group_rows;
  product.segments = p.groups;
  product.token = m_start;
  product.tokens = p.m - m_start;
  product.feature = k_start;
  product.features = p.k - k_start;

  typename Tile::Accumulator acc;
  Tile::clear(acc);
  accumulate<Math, Staged, Inner::other, Tile>(acc, product);

  using Element = typename Math::Element;
  Element* dx = static_cast<Element*>(p.dx) + m_start * p.dx_stride + k_start;
  store_tile<Tile>(acc, dx, p.dx_stride, product.tokens, product.features, [](int) { return 0.0f; });
}

template <class Math, class Staged, class Tile>
cudaError_t launch(const GradInput& g, cudaStream_t stream) {
  const Layer& l = g.layer;
  const int64_t group_rows = l.n / l.groups, k_tiles = ceil_div(l.k, Tile::kCols);
  const Parameters p{
      source(g.dy, l.groups == 1 ? Tile::kDepth : group_rows, kDtype<typename Math::Element>),
      source(l.weight, Tile::kCols, kDtype<Staged>),
      l.u,
      l.v,
      g.dx.data,
      g.dx.row_stride,
      static_cast<int>(l.m),
      static_cast<int>(l.k),
      static_cast<int>(k_tiles),
      static_cast<int>(group_rows),
      static_cast<int>(l.groups),
  };
  using Stage = ProductStage<Math, Staged, Inner::other, Tile>;
  static_assert(Stage::kTotalBytes <= kMostSharedBytes);
  return ptx::launch<grad_input_kernel<Math, Staged, Tile>>(ceil_div(l.m, Tile::kRows) * k_tiles, Stage::kTotalBytes,
                                                            stream, p);
}

}  // namespace

cudaError_t grad_input(const GradInput& g, cudaStream_t stream) {
  const Layer& l = g.layer;
  const auto tiles = [&](int64_t rows, int64_t cols) { return ceil_div(l.m, rows) * ceil_div(l.k, cols); };
  return with_product_plan(l, g.dy.dtype, tiles, [&](auto math, auto staged, auto tile) {
    return launch<decltype(math), decltype(staged), decltype(tile)>(g, stream);
  });
}

}  // namespace rlrr
