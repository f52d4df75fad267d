// du, dv and df: how the tokens are split, and the launches of both kernels.
#include <limits>

#include "../partials.cuh"
#include "persistent_gram.cuh"

namespace rlrr::hopper {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The estimated time to reduce a tile, in steps of 64 tokens.
constexpr int64_t kEpilogueSteps = 4;

struct Plan {
  int64_t steps, split_steps, splits;
};

// df has one row of partial sums for each split.
Slices slices_of(const Layer& layer) { return Slices(layer, kTileRows, kTileCols, 1); }

// More splits fill idle multiprocessors; each costs an epilogue and partial sums.
Plan plan(const Layer& layer) {
  Plan p;
  p.steps = ceil_div(layer.m, kBox);
  const int64_t tiles = layer.groups * ceil_div(layer.n / layer.groups, kTileRows) * ceil_div(layer.k, kTileCols);
  const Slices slices = slices_of(layer);
  const int64_t most = slices.one() ? kWorkspaceBytes / 4 / slices.floats() : 1;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t splits = 1;
       splits == 1 || (splits <= p.steps && splits <= layer.device.multiprocessors && splits <= most); ++splits) {
    const int64_t steps = ceil_div(p.steps, splits);
    const int64_t waves = ceil_div(tiles * splits, layer.device.multiprocessors);
    const int64_t cost = waves * (steps + kEpilogueSteps);
    if (cost >= least) continue;
    least = cost;
    p.split_steps = steps;
    p.splits = ceil_div(p.steps, steps);
  }
  return p;
}

}  // namespace

bool supports(const GradScales& g) {
  const Layer& layer = g.layer;
  return fits_layer(layer, g.x.dtype) && g.dy.dtype == g.x.dtype && fits_boxes(g.x, layer.m, layer.k) &&
         fits_boxes(g.dy, layer.m, layer.n);
}

int64_t workspace_floats(const GradScales& g) { return plan(g.layer).splits * slices_of(g.layer).floats(); }

cudaError_t grad_scales(const GradScales& g, cudaStream_t stream) {
  const Layer& layer = g.layer;
  const Plan chosen = plan(layer);
  Gram p = {};
  cudaError_t error = describe(p.dy, g.dy, layer.m, layer.n, kBox);
  if (error == cudaSuccess) error = describe(p.x, g.x, layer.m, layer.k, kBox);
  if (error == cudaSuccess) error = describe(p.weight, layer.weight, layer.n, layer.k, kBox);
  if (error != cudaSuccess) return error;
  p.u = layer.u;
  p.v = layer.v;
  p.k = static_cast<int>(layer.k);
  p.group_rows = static_cast<int>(layer.n / layer.groups);
  p.steps = static_cast<int>(chosen.steps);
  p.split_steps = static_cast<int>(chosen.split_steps);
  p.splits = static_cast<int>(chosen.splits);
  return slices_of(layer).each([&](const Slice& slice) {
    const Partials sums = partials_of(g, slice, chosen.splits, 1);
    p.du_partial = sums.du_rows_data;
    p.dv_partial = sums.dv_rows_data;
    p.df_partial = sums.df ? sums.df_rows_data : nullptr;
    p.first_group = static_cast<int>(slice.group);
    p.first_tile = static_cast<int>(slice.tile);
    p.first_col = static_cast<int>(slice.first_col());
    p.rows = static_cast<int>(slice.rows());
    p.cols = static_cast<int>(slice.cols());
    p.group_tiles = static_cast<int>(slice.tiles);
    p.row_tiles = static_cast<int>(slice.groups * slice.tiles);
    p.col_tiles = static_cast<int>(slice.col_tiles);
    p.items = static_cast<int>(chosen.splits * p.row_tiles * p.col_tiles);
    const int blocks = p.items < layer.device.multiprocessors ? p.items : layer.device.multiprocessors;
    constexpr int kBytes = sizeof(GramMemory);
    error = g.x.dtype == Dtype::float16 ? ptx::launch_warpgroups<gram_kernel<fp16>>(blocks, kBytes, stream, p)
                                        : ptx::launch_warpgroups<gram_kernel<bf16>>(blocks, kBytes, stream, p);
    return error == cudaSuccess ? sum_partials(sums, stream) : error;
  });
}

}  // namespace rlrr::hopper
