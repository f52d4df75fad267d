// Partial sums of grad_scales: where they lie, and the second kernel, which adds them.
#pragma once

#include "numeric.cuh"
#include "slices.h"

namespace rlrr {

// Rows of partial sums behind each result of a slice, row after row in one workspace:
//   du [du_rows, n],  dv [groups, dv_rows, k],  df [df_rows, n].
struct Partials {
  float *du_rows_data, *dv_rows_data, *df_rows_data;
  float *du, *dv, *df;  // the slice's first results; df null: not wanted
  int64_t n, k;         // of the slice
  int groups, du_rows, dv_rows, df_rows;
  bool more_of_du, more_of_dv;  // slices before this one left sums there, to be added to
};

// `df_rows`: of a split. The first slice of a row of them sees to df.
inline Partials partials_of(const GradScales& g, const Slice& s, int64_t splits, int64_t df_rows) {
  Partials p;
  p.n = s.rows(), p.k = s.cols();
  p.groups = static_cast<int>(s.groups);
  p.du_rows = static_cast<int>(splits * s.col_tiles);
  p.dv_rows = static_cast<int>(splits * s.tiles);
  p.df_rows = static_cast<int>(splits * df_rows);
  p.du_rows_data = g.workspace;
  p.dv_rows_data = p.du_rows_data + p.du_rows * p.n;
  p.df_rows_data = p.dv_rows_data + p.groups * p.dv_rows * p.k;
  p.du = g.du + s.first_row();
  p.dv = g.dv + s.group * g.layer.k + s.first_col();
  p.df = g.df && s.col_tile == 0 ? g.df + s.first_row() : nullptr;
  p.more_of_du = s.col_tile > 0;
  p.more_of_dv = s.tile > 0;
  return p;
}

// The sum of a column. Eight running sums keep as many loads under way, and round less than one would.
RLRR_DEVICE float sum_column(const float* from, int rows, int64_t stride) {
  constexpr int kSums = 8;
  float sums[kSums] = {};
  for (int row = 0; row < rows; row += kSums) {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      if (row + i < rows) sums[i] += ptx::load(from + (row + i) * stride);
  }
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

RLRR_DEVICE void finish_column(float* to, float sum, bool more) { ptx::store(to, more ? ptx::load(to) + sum : sum); }

// A column a thread: first du's, then dv's of each group, then df's. Static, as two files include it.
static RLRR_KERNEL(2) sum_partials_kernel(RLRR_PARAMETER Partials p) {
  int64_t column = static_cast<int64_t>(ptx::block()) * kThreads + ptx::thread();
  if (column < p.n)
    return finish_column(p.du + column, sum_column(p.du_rows_data + column, p.du_rows, p.n), p.more_of_du);
  column -= p.n;
  if (column < p.groups * p.k) {
    const float* rows = p.dv_rows_data + column / p.k * p.dv_rows * p.k;
    return finish_column(p.dv + column, sum_column(rows + column % p.k, p.dv_rows, p.k), p.more_of_dv);
  }
  column -= p.groups * p.k;
  if (p.df && column < p.n) ptx::store(p.df + column, sum_column(p.df_rows_data + column, p.df_rows, p.n));
}

static cudaError_t sum_partials(const Partials& p, cudaStream_t stream) {
  const int64_t results = p.n * (p.df ? 2 : 1) + p.groups * p.k;
  return ptx::launch<sum_partials_kernel>((results + kThreads - 1) / kThreads, 0, stream, p);
}

}  // namespace rlrr
