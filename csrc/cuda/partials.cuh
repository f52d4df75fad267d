// Partial sums of grad_scales: where they lie, and the second kernel, which adds them.
#pragma once

#include "numeric.cuh"

namespace rlrr {

// Rows of partial sums behind each result, row after row in one workspace:
//   du [du_rows, n],  dv [groups, dv_rows, k],  df [df_rows, n].
struct Partials {
  float *du_rows_data, *dv_rows_data, *df_rows_data;
  float *du, *dv, *df;  // df null: not wanted
  int64_t n, k;
  int groups, du_rows, dv_rows, df_rows;
};

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

// A column a thread: first du's, then dv's of each group, then df's. Static, as two files include it.
static RLRR_KERNEL sum_partials_kernel(RLRR_PARAMETER Partials p) {
  int64_t column = static_cast<int64_t>(ptx::block()) * kThreads + ptx::thread();
  if (column < p.n) return ptx::store(p.du + column, sum_column(p.du_rows_data + column, p.du_rows, p.n));
  column -= p.n;
  if (column < p.groups * p.k) {
    const float* rows = p.dv_rows_data + column / p.k * p.dv_rows * p.k;
    return ptx::store(p.dv + column, sum_column(rows + column % p.k, p.dv_rows, p.k));
  }
  column -= p.groups * p.k;
  if (p.df && column < p.n) ptx::store(p.df + column, sum_column(p.df_rows_data + column, p.df_rows, p.n));
}

}  // namespace rlrr
