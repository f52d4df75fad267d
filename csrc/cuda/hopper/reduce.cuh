// A tile of G = dy^T x against its tile of W: partial sums of du and dv, without G ever leaving the
// registers. With P = G * W:  du = P v,  dv = P^T u.
//
// W comes through the same ring as dy and x did, half a tile at a time, so that the fetching warp has
// it there when the products end.
#pragma once

#include "../numeric.cuh"
#include "gram.cuh"

namespace rlrr::hopper {

// Eight values of each of the eight lanes of one t: lane g is left with the sum of the g-th.
RLRR_DEVICE float reduce_scatter(float (&values)[8], int g) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = g & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? values[i + half] : values[i];
      const float give = upper ? values[i] : values[i + half];
      values[i] = keep + ptx::shuffle_xor(give, 4 * half);
    }
  }
  return values[0];
}

// What a lane knows of its rows g and g + 8 and gathers for them.
struct RowShare {
  bool inside[2];
  float u[2];
  float du[2];
};

// Half a tile of W, 128 columns from column 128 * half of the tile on, in two boxes. `v`: of these
// columns, `cols` of which exist. Adds to the rows' du; stores the warp's dv of each column.
template <class T>
RLRR_DEVICE void reduce_half(const float* sums, const char* boxes, RowShare& rows, const float* v, int cols, float* dv,
                             const Lane& l) {
#pragma unroll
  for (int first = 0; first < kTileCols / 2; first += 32) {
    float column[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int col = first + 8 * j;
      const bool col_inside = col < cols;  // K is a multiple of 8
      const float2 v_pair =
          col_inside ? ptx::load(reinterpret_cast<const float2*>(v + col + 2 * l.t)) : float2{0.0f, 0.0f};
      float2 dv_pair = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = swizzled(16 * l.warp + l.g + 8 * i, col % kBox / 8) + 4 * l.t;
        const float2 w = ptx::widen2<T>(ptx::load_shared<uint32_t>(boxes + col / kBox * kBoxBytes + at));
        const float* g = sums + col / 2 + 2 * i;
        // beyond the group's rows stands another's dy; beyond the matrix 0, which infinities make NaN
        const bool inside = rows.inside[i] && col_inside;
        const float2 p = {inside ? g[0] * w.x : 0.0f, inside ? g[1] * w.y : 0.0f};
        rows.du[i] = ptx::fma(p.y, v_pair.y, ptx::fma(p.x, v_pair.x, rows.du[i]));
        dv_pair.x = ptx::fma(p.x, rows.u[i], dv_pair.x);
        dv_pair.y = ptx::fma(p.y, rows.u[i], dv_pair.y);
      }
      column[2 * j] = dv_pair.x, column[2 * j + 1] = dv_pair.y;
    }
    const float sum = reduce_scatter(column, l.g);
    ptx::store_shared(reinterpret_cast<char*>(dv + first + 8 * (l.g / 2) + 2 * l.t + l.g % 2), sum);
  }
}

}  // namespace rlrr::hopper
