// du, dv and df in one pass over dy and x: each tile of G = dy^T x is reduced against W as soon as it is complete, and
// never stored.
//
// All three are linear in G, so that blocks can share the tokens of a tile: each leaves partial sums, which a second
// kernel adds in a fixed order, without atomics.
#include "math.cuh"
#include "partials.cuh"
#include "plan.cuh"
#include "reduce.cuh"

namespace rlrr {
namespace {

struct Parameters {
  Source dy, x, weight;
  const float *u, *v;
  float *du, *dv, *df;                               // partial sums of the slice
  int first_group, groups, first_tile, group_tiles;  // of the slice
  int first_col, cols, col_tiles, columns, rows;     // of the slice; `columns` of blocks include those for df
  int m, k, group_rows, splits, split_tokens;
};

template <class Math, class Tile>
struct Stage {
  using Element = typename Math::Element;
  static constexpr int kPadding = padding(sizeof(Element), sizeof(Element), Math::kTensorCores, Inner::other);
  using Left = SharedTile<Element, Tile::kDepth, Tile::kRows, kPadding>;
  using Right = SharedTile<Element, Tile::kDepth, Tile::kCols, kPadding>;
  static constexpr int kBytes = Left::kBytes + Right::kBytes;
  static constexpr int kPatchBytes = PatchShared<float, Tile>::kBytes;  // after the loop, in the same memory
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

// Blocks that share the tokens of a split for df. These additions wait for memory: a single block would take longer
// than the blocks that multiply.
constexpr int kTokenShares = 4;

// Sums the columns of dy, `kRun` tokens at a time: a sum of short sums rounds less than one long sum.
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
RLRR_KERNEL(kBlocks<Math, Tile>)
grad_scales_kernel(RLRR_PARAMETER Parameters p) {
  // The blocks of one split run together, since they share its rows of dy and x in L2. If df is wanted, each row of
  // tiles has a few more blocks, which only sum dy: in the loop of the product this would load dy into registers that
  // the product does not need.
  const int column = ptx::block() % p.columns;
  const int n_tiles = p.groups * p.group_tiles;
  const int n_tile = ptx::block() / p.columns % n_tiles;
  const int split = ptx::block() / p.columns / n_tiles;
  const int group = p.first_group + n_tile / p.group_tiles;
  const int in_group = (p.first_tile + n_tile % p.group_tiles) * Tile::kRows;
  const int n_start = group * p.group_rows + in_group;
  const int left_in_group = p.group_rows - in_group;
  const int in_slice = n_start - p.first_group * p.group_rows - p.first_tile * Tile::kRows;
  const int first = split * p.split_tokens;
  const int last = p.m - first < p.split_tokens ? p.m : first + p.split_tokens;

  if (column >= p.col_tiles) {
    const int share = column - p.col_tiles, tokens = (last - first + kTokenShares - 1) / kTokenShares;
    const int from = first + share * tokens;
    const int to = last - from < tokens ? last : from + tokens;
    float* const df = p.df + (static_cast<int64_t>(split) * kTokenShares + share) * p.rows + in_slice;
    return sum_tokens<typename Math::Element, Tile::kRows>(p.dy, from, to, n_start, left_in_group, df);
  }

  const int k_start = p.first_col + column * Tile::kCols;
  const Lane l = lane();
  typename Tile::Accumulator acc;
  Tile::clear(acc);
  using Shared = Stage<Math, Tile>;
  const int steps = (last - first + Tile::kDepth - 1) / Tile::kDepth;
  const auto multiply = [&](int stage) { multiply_stage<Math, Tile>(acc, Shared(stage), l); };
  if (p.dy.vectors && p.x.vectors && left_in_group >= Tile::kRows && p.k - k_start >= Tile::kCols &&
      (last - first) % Tile::kDepth == 0) {
    Stream<typename Shared::Left> dy(p.dy, first, n_start, Tile::kDepth * p.dy.row_stride);
    Stream<typename Shared::Right> x(p.x, first, k_start, Tile::kDepth * p.x.row_stride);
    pipeline<Tile::kStages>(
        steps, [&](int stage) { dy.copy_next(Shared(stage).left), x.copy_next(Shared(stage).right); }, multiply);
  } else {
    int token = first;
    pipeline<Tile::kStages>(
        steps,
        [&](int stage) {
          copy_tile(Shared(stage).left, p.dy, token, n_start, last - token, left_in_group);
          copy_tile(Shared(stage).right, p.x, token, k_start, last - token, p.k - k_start);
          token += Tile::kDepth;
        },
        multiply);
  }

  Patch patch;
  patch.weight = p.weight;
  patch.u = p.u + n_start;
  patch.v = p.v + static_cast<int64_t>(group) * p.k + k_start;
  patch.n = n_start;
  patch.k = k_start;
  patch.rows = left_in_group < Tile::kRows ? left_in_group : Tile::kRows;
  patch.cols = p.k - k_start < Tile::kCols ? p.k - k_start : Tile::kCols;
  const int64_t du_row = static_cast<int64_t>(split) * p.col_tiles + column;
  const int64_t dv_row =
      (static_cast<int64_t>(n_tile / p.group_tiles) * p.splits + split) * p.group_tiles + n_tile % p.group_tiles;
  float* const du = p.du + du_row * p.rows + in_slice;
  float* const dv = p.dv + dv_row * p.cols + column * Tile::kCols;
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
  int64_t splits, split_tokens;
};

// The estimated time to reduce a tile, in tokens of the loop.
constexpr int64_t kEpilogueTokens = 256;

template <class Tile>
Slices slices_of(const Layer& l) {
  return Slices(l, Tile::kRows, Tile::kCols, kTokenShares);
}

template <class Tile>
void consider(const Layer& l, bool large, double efficiency, double& least, Plan& best) {
  const int64_t tiles = l.groups * ceil_div(l.n / l.groups, Tile::kRows) * ceil_div(l.k, Tile::kCols);
  const int64_t steps = ceil_div(l.m, Tile::kDepth);
  const Slices slices = slices_of<Tile>(l);
  int64_t most = slices.one() ? kWorkspaceBytes / 4 / slices.floats() : 1;
  if (most > steps) most = steps;
  if (most > l.device.multiprocessors) most = l.device.multiprocessors;
  for (int64_t splits = 1; splits == 1 || splits <= most; ++splits) {
    const int64_t tokens = ceil_div(steps, splits) * Tile::kDepth;
    const int64_t waves = ceil_div(tiles * splits, l.device.multiprocessors);
    const double cost = waves * (tokens + kEpilogueTokens) * Tile::kRows * Tile::kCols / efficiency;
    if (cost >= least) continue;
    least = cost;
    best = {large, ceil_div(l.m, tokens), tokens};
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

// Calls run(math, tile, plan).
template <class Run>
cudaError_t with_plan(const GradScales& g, const Run& run) {
  if (!fits(g.layer)) return cudaErrorInvalidValue;
  return with_math(g.x.dtype, g.layer.tf32, [&](auto math) {
    using Math = decltype(math);
    const Plan chosen = plan<Math>(g.layer);
    return chosen.large ? run(math, LargeTile<Math>{}, chosen) : run(math, SmallTile<Math>{}, chosen);
  });
}

template <class Math, class Tile>
cudaError_t launch(const GradScales& g, const Plan& plan, const Slice& slice, cudaStream_t stream) {
  const Layer& l = g.layer;
  const Partials partials = partials_of(g, slice, plan.splits, kTokenShares);
  const int64_t first_col = l.groups == 1 ? Tile::kRows : slice.group_rows;
  const int64_t columns = slice.col_tiles + (partials.df ? kTokenShares : 0);
  const Dtype dtype = kDtype<typename Math::Element>;
  const Parameters p{
      source(g.dy, first_col, dtype),
      source(g.x, Tile::kCols, dtype),
      source(l.weight, Tile::kCols, l.weight.dtype == dtype ? dtype : Dtype::float32),
      l.u,
      l.v,
      partials.du_rows_data,
      partials.dv_rows_data,
      partials.df_rows_data,
      static_cast<int>(slice.group),
      static_cast<int>(slice.groups),
      static_cast<int>(slice.tile),
      static_cast<int>(slice.tiles),
      static_cast<int>(slice.first_col()),
      static_cast<int>(slice.cols()),
      static_cast<int>(slice.col_tiles),
      static_cast<int>(columns),
      static_cast<int>(slice.rows()),
      static_cast<int>(l.m),
      static_cast<int>(l.k),
      static_cast<int>(slice.group_rows),
      static_cast<int>(plan.splits),
      static_cast<int>(plan.split_tokens),
  };
  static_assert(Stage<Math, Tile>::kTotalBytes <= kMostSharedBytes);
  const cudaError_t error = ptx::launch<grad_scales_kernel<Math, Tile>>(
      plan.splits * slice.groups * slice.tiles * columns, Stage<Math, Tile>::kTotalBytes, stream, p);
  return error == cudaSuccess ? sum_partials(partials, stream) : error;
}

}  // namespace

int64_t workspace_floats(const GradScales& g) {
  int64_t floats = 0;
  with_plan(g, [&](auto, auto tile, const Plan& plan) {
    floats = plan.splits * slices_of<decltype(tile)>(g.layer).floats();
    return cudaSuccess;
  });
  return floats;
}

cudaError_t grad_scales(const GradScales& g, cudaStream_t stream) {
  return with_plan(g, [&](auto math, auto tile, const Plan& plan) {
    return slices_of<decltype(tile)>(g.layer).each(
        [&](const Slice& slice) { return launch<decltype(math), decltype(tile)>(g, plan, slice, stream); });
  });
}

}  // namespace rlrr
