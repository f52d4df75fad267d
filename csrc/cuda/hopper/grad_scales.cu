// du, dv and df: how the tokens are split, and the two launches.
#include "launch.h"

#include <limits>

#include "../partials.cuh"
#include "gram_kernel.cuh"
#include "tensor_map.h"

namespace rlrr::hopper {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of partial sums, beyond which the tokens are split no further. One split of a very large layer can
// take more.
constexpr int64_t kWorkspaceBytes = 2 << 20;
// What reducing a finished tile costs, in steps of 64 tokens.
constexpr int64_t kEpilogueSteps = 4;

struct Plan {
  int64_t group_tiles, row_tiles, col_tiles, steps, split_steps, splits;

  int64_t du_rows() const { return splits * col_tiles; }
  int64_t dv_rows() const { return splits * group_tiles; }
};

// More splits fill idle multiprocessors; each costs an epilogue and partial sums.
Plan plan(const Layer& layer) {
  Plan p;
  p.group_tiles = ceil_div(layer.n / layer.groups, kTileRows);
  p.row_tiles = layer.groups * p.group_tiles;
  p.col_tiles = ceil_div(layer.k, kTileCols);
  p.steps = ceil_div(layer.m, kBox);
  const int64_t split_bytes = 4 * (p.col_tiles * layer.n + p.row_tiles * layer.k + layer.n);
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t splits = 1; splits == 1 || (splits <= p.steps && splits <= layer.device.multiprocessors &&
                                           splits * split_bytes <= kWorkspaceBytes);
       ++splits) {
    const int64_t steps = ceil_div(p.steps, splits);
    const int64_t waves = ceil_div(p.row_tiles * p.col_tiles * splits, layer.device.multiprocessors);
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

int64_t workspace_floats(const GradScales& g) {
  const Layer& layer = g.layer;
  const Plan chosen = plan(layer);
  return chosen.du_rows() * layer.n + layer.groups * chosen.dv_rows() * layer.k + chosen.splits * layer.n;
}

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
  p.du_partial = g.workspace;
  p.dv_partial = p.du_partial + chosen.du_rows() * layer.n;
  p.df_partial = g.df ? p.dv_partial + layer.groups * chosen.dv_rows() * layer.k : nullptr;
  p.n = static_cast<int>(layer.n);
  p.k = static_cast<int>(layer.k);
  p.group_rows = static_cast<int>(layer.n / layer.groups);
  p.group_tiles = static_cast<int>(chosen.group_tiles);
  p.row_tiles = static_cast<int>(chosen.row_tiles);
  p.col_tiles = static_cast<int>(chosen.col_tiles);
  p.steps = static_cast<int>(chosen.steps);
  p.split_steps = static_cast<int>(chosen.split_steps);
  p.splits = static_cast<int>(chosen.splits);
  p.items = static_cast<int>(chosen.splits * chosen.row_tiles * chosen.col_tiles);

  const int blocks = p.items < layer.device.multiprocessors ? p.items : layer.device.multiprocessors;
  constexpr int kBytes = sizeof(GramMemory);
  error = g.x.dtype == Dtype::float16 ? ptx::launch_warpgroups<gram_kernel<fp16>>(blocks, kBytes, stream, p)
                                      : ptx::launch_warpgroups<gram_kernel<bf16>>(blocks, kBytes, stream, p);
  if (error != cudaSuccess) return error;

  Partials sums = {};
  sums.du_rows_data = p.du_partial, sums.dv_rows_data = p.dv_partial, sums.df_rows_data = p.df_partial;
  sums.du = g.du, sums.dv = g.dv, sums.df = g.df;
  sums.n = layer.n, sums.k = layer.k;
  sums.groups = static_cast<int>(layer.groups);
  sums.du_rows = static_cast<int>(chosen.du_rows());
  sums.dv_rows = static_cast<int>(chosen.dv_rows());
  sums.df_rows = static_cast<int>(chosen.splits);
  const int64_t results = layer.n * (g.df ? 2 : 1) + layer.groups * layer.k;
  return ptx::launch<sum_partials_kernel>(ceil_div(results, kThreads), 0, stream, sums);
}

}  // namespace rlrr::hopper
