// du, dv and df in one pass over dy and x: G = dy^T x is reduced against W as soon as a tile of it is
// complete, and never stored.
//
// All three are linear in G, so a block may hold any share of the tokens: blocks of one tile and
// different splits leave partial sums, which a second kernel adds in a fixed order. No atomics.
#include "fragments.cuh"
#include "launch.h"
#include "partials.cuh"
#include "pipeline.cuh"
#include "plan.cuh"
#include "reduce.cuh"

namespace rlrr {
namespace {

struct Parameters {
  Source dy, x, weight;
  const float *u, *v;
  float *du, *dv, *df;  // partial sums
  int m, n, k, group_rows, group_tiles, groups, k_tiles, columns, splits, split_tokens;
};

template <class Math, class Tile>
struct Stage {
  using Element = typename Math::Element;
  static constexpr int kPadding = padding(sizeof(Element), sizeof(Element), Math::kTensorCores, Inner::other);
  using Left = SharedTile<Element, Tile::kDepth, Tile::kRows, kPadding>;
  using Right = SharedTile<Element, Tile::kDepth, Tile::kCols, kPadding>;
  static constexpr int kBytes = Left::kBytes + Right::kBytes;
  static constexpr int kPatchBytes = PatchShared<float, Tile>::kBytes;  // after the loop, in the same place
  static constexpr int kTotalBytes = kBytes * Tile::kStages > kPatchBytes ? kBytes * Tile::kStages : kPatchBytes;

  Left left;
  Right right;

  RLRR_DEVICE explicit Stage(int stage)
      : left{ptx::shared_memory() + stage * kBytes}, right{left.data + Left::kBytes} {}
};

template <class Math, class Tile>
RLRR_DEVICE void multiply_stage(typename Tile::Accumulator& acc, const Stage<Math, Tile>& stage, const Lane& l) {
#pragma unroll
  for (int depth = 0; depth < Tile::kDepth; depth += Math::kDepth) {
    typename Math::Right right[Tile::kColTiles];
#pragma unroll
    for (int j = 0; j < Tile::kColTiles; j += 2) {
      typename Math::Right pair[2];
      load_rights(Math{}, pair, stage.right, Tile::warp_col() + 8 * j, depth, l);
      right[j] = pair[0], right[j + 1] = pair[1];
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      auto left = load_left<Inner::other>(Math{}, stage.left, Tile::warp_row() + 16 * i, depth, l);
      Math::round(left);
#pragma unroll
      for (int j = 0; j < Tile::kColTiles; ++j) Math::multiply_add(acc[i][j], left, right[j]);
    }
  }
}

// Blocks among which the tokens of a split fall for df. Adding is all latency: one block would take
// longer than those that multiply.
constexpr int kTokenShares = 4;

// Adds dy's columns up, `kRun` tokens at a time: the sum of short sums rounds less than one long one.
template <class Element, int kCols>
RLRR_DEVICE void sum_tokens(const Source& dy, int first, int last, int64_t col, int cols, float* to) {
  constexpr int kLanes = kThreads / kCols, kRun = 16;
  static_assert(kThreads % kCols == 0);
  const int c = ptx::thread() % kCols, lane = ptx::thread() / kCols;
  const Element* from = reinterpret_cast<const Element*>(dy.data) + (col + (c < cols ? c : 0)) * dy.col_stride;
  float total = 0.0f;
  for (int m = first + lane; m < last; m += kRun * kLanes) {
    float run = 0.0f;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const int row = m + i * kLanes;
      const float value = widen(ptx::load(from + (row < last ? row : m) * dy.row_stride));
      run += row < last ? value : 0.0f;
    }
    total += run;
  }
  ptx::store_shared(ptx::shared_memory() + 4 * ptx::thread(), total);
  ptx::barrier();
  if (ptx::thread() >= cols || ptx::thread() >= kCols) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) sum += ptx::load_shared<float>(ptx::shared_memory() + 4 * (i * kCols + c));
  ptx::store(to + c, sum);
}

template <class Math, class Tile>
RLRR_KERNEL grad_scales_kernel(RLRR_PARAMETER Parameters p) {
  // The blocks of one split run together: they share its rows of dy and x in L2. Where f trains, each
  // row of tiles has a few blocks more, which only add up dy: doing that inside the product's loop
  // would pull dy through registers that the product does not need.
  const int column = ptx::block() % p.columns;
  const int n_tiles = p.groups * p.group_tiles;
  const int n_tile = ptx::block() / p.columns % n_tiles;
  const int split = ptx::block() / p.columns / n_tiles;
  const int group = n_tile / p.group_tiles;
  const int in_group = n_tile % p.group_tiles * Tile::kRows;
  const int n_start = group * p.group_rows + in_group;
  const int left_in_group = p.group_rows - in_group;
  const int first = split * p.split_tokens;
  const int last = p.m - first < p.split_tokens ? p.m : first + p.split_tokens;

  if (column >= p.k_tiles) {
    const int share = column - p.k_tiles, tokens = (last - first + kTokenShares - 1) / kTokenShares;
    const int from = first + share * tokens;
    const int to = last - from < tokens ? last : from + tokens;
    float* const df = p.df + (static_cast<int64_t>(split) * kTokenShares + share) * p.n + n_start;
    return sum_tokens<typename Math::Element, Tile::kRows>(p.dy, from, to, n_start, left_in_group, df);
  }

  const int k_start = column * Tile::kCols;
  const Lane l = lane();
  typename Tile::Accumulator acc;
  Tile::clear(acc);
  int token = first;
  pipeline<Tile::kStages>((last - first + Tile::kDepth - 1) / Tile::kDepth,
                          [&](int stage) {
                            const Stage<Math, Tile> to(stage);
                            copy_tile(to.left, p.dy, token, n_start, last - token, left_in_group);
                            copy_tile(to.right, p.x, token, k_start, last - token, p.k - k_start);
                            token += Tile::kDepth;
                          },
                          [&](int stage) { multiply_stage<Math, Tile>(acc, Stage<Math, Tile>(stage), l); });

  Patch patch;
  patch.weight = p.weight;
  patch.u = p.u + n_start;
  patch.v = p.v + static_cast<int64_t>(group) * p.k + k_start;
  patch.n = n_start;
  patch.k = k_start;
  patch.rows = left_in_group < Tile::kRows ? left_in_group : Tile::kRows;
  patch.cols = p.k - k_start < Tile::kCols ? p.k - k_start : Tile::kCols;
  const int64_t du_row = static_cast<int64_t>(split) * p.k_tiles + column;
  const int64_t dv_row = (static_cast<int64_t>(group) * p.splits + split) * p.group_tiles + n_tile % p.group_tiles;
  float* const du = p.du + du_row * p.n + n_start;
  float* const dv = p.dv + dv_row * p.k + k_start;
  using Element = typename Math::Element;
  if (sizeof(Element) == 2 && p.weight.dtype == kDtype<Element>) {
    reduce_tile<Element, Tile>(acc, patch, du, dv);
  } else {
    reduce_tile<float, Tile>(acc, patch, du, dv);
  }
}

// Tile and splits. More splits fill idle multiprocessors; each costs an epilogue and partial sums.
struct Plan {
  bool large;
  int64_t k_tiles, group_tiles, splits, split_tokens;
};

// Of partial sums, beyond which the tokens are split no further. One split of a very large layer can
// take more.
constexpr int64_t kWorkspaceBytes = 2 << 20;
// What reducing a finished tile costs, in tokens of the loop.
constexpr int64_t kEpilogueTokens = 256;

template <class Tile>
void consider(const Layer& l, bool large, double efficiency, double& least, Plan& best) {
  const int64_t k_tiles = ceil_div(l.k, Tile::kCols), group_tiles = ceil_div(l.n / l.groups, Tile::kRows);
  const int64_t n_tiles = l.groups * group_tiles, steps = ceil_div(l.m, Tile::kDepth);
  const int64_t bytes = 4 * ((k_tiles + kTokenShares) * l.n + n_tiles * l.k);
  int64_t most = kWorkspaceBytes / bytes;
  if (most > steps) most = steps;
  if (most > l.device.multiprocessors) most = l.device.multiprocessors;
  for (int64_t splits = 1; splits == 1 || splits <= most; ++splits) {
    const int64_t tokens = ceil_div(steps, splits) * Tile::kDepth;
    const int64_t waves = ceil_div(n_tiles * k_tiles * splits, l.device.multiprocessors);
    const double cost = waves * (tokens + kEpilogueTokens) * Tile::kRows * Tile::kCols / efficiency;
    if (cost >= least) continue;
    least = cost;
    best = {large, k_tiles, group_tiles, ceil_div(l.m, tokens), tokens};
  }
}

template <class Math>
using LargeTile = Tile<128, Math::kTensorCores ? 128 : 64, kProductDepth<Math>, 2, 2, 3>;
template <class Math>
using SmallTile = Tile<64, 64, kProductDepth<Math>, 2, 2, 3>;

template <class Math>
Plan plan(const Layer& l) {
  Plan best;
  double least = 1e300;
  consider<LargeTile<Math>>(l, true, 1.0, least, best);
  consider<SmallTile<Math>>(l, false, 0.6, least, best);
  return best;
}

template <class Math, class Tile>
cudaError_t launch(const GradScales& g, const Plan& plan, cudaStream_t stream) {
  const Layer& l = g.layer;
  const int64_t group_rows = l.n / l.groups, first_col = l.groups == 1 ? Tile::kRows : group_rows;
  const int64_t du_rows = plan.splits * plan.k_tiles, dv_rows = plan.splits * plan.group_tiles;
  const int64_t columns = plan.k_tiles + (g.df ? kTokenShares : 0);
  float* const du = g.workspace;
  float* const dv = du + du_rows * l.n;
  float* const df = dv + l.groups * dv_rows * l.k;
  const Dtype dtype = kDtype<typename Math::Element>;
  const Parameters p{
      source(g.dy, first_col, dtype),
      source(g.x, Tile::kCols, dtype),
      source(l.weight, Tile::kCols, l.weight.dtype == dtype ? dtype : Dtype::float32),
      l.u,
      l.v,
      du,
      dv,
      df,
      static_cast<int>(l.m),
      static_cast<int>(l.n),
      static_cast<int>(l.k),
      static_cast<int>(group_rows),
      static_cast<int>(plan.group_tiles),
      static_cast<int>(l.groups),
      static_cast<int>(plan.k_tiles),
      static_cast<int>(columns),
      static_cast<int>(plan.splits),
      static_cast<int>(plan.split_tokens),
  };
  static_assert(Stage<Math, Tile>::kTotalBytes <= kMostSharedBytes);
  const cudaError_t error = ptx::launch<grad_scales_kernel<Math, Tile>>(
      plan.splits * l.groups * plan.group_tiles * columns, Stage<Math, Tile>::kTotalBytes, stream, p);
  if (error != cudaSuccess) return error;
  const Partials partials{
      du,
      dv,
      df,
      g.du,
      g.dv,
      g.df,
      l.n,
      l.k,
      static_cast<int>(l.groups),
      static_cast<int>(du_rows),
      static_cast<int>(dv_rows),
      static_cast<int>(plan.splits * kTokenShares),
  };
  const int64_t results = l.n * (g.df ? 2 : 1) + l.groups * l.k;
  return ptx::launch<sum_partials_kernel>(ceil_div(results, kThreads), 0, stream, partials);
}

}  // namespace

int64_t workspace_floats(const GradScales& g) {
  const Layer& l = g.layer;
  if (!fits(l)) return 0;
  Plan chosen;
  with_math(g.x.dtype, l.tf32, [&](auto math) {
    chosen = plan<decltype(math)>(l);
    return cudaSuccess;
  });
  return chosen.splits * ((chosen.k_tiles + kTokenShares) * l.n + l.groups * chosen.group_tiles * l.k);
}

cudaError_t grad_scales(const GradScales& g, cudaStream_t stream) {
  const Layer& l = g.layer;
  if (!fits(l)) return cudaErrorInvalidValue;
  return with_math(g.x.dtype, l.tf32, [&](auto math) {
    using Math = decltype(math);
    const Plan chosen = plan<Math>(l);
    return chosen.large ? launch<Math, LargeTile<Math>>(g, chosen, stream)
                        : launch<Math, SmallTile<Math>>(g, chosen, stream);
  });
}

}  // namespace rlrr
