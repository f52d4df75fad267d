// W * (1 + u v) as the left operand of wgmma, formed between shared memory and the tensor cores.
//
// W' lives nowhere but here: in four registers a lane, 64 rows by 16 of depth a warpgroup.
#pragma once

#include "../numeric.cuh"
#include "tile.cuh"

namespace rlrr::hopper {

// Which way a box of W lies: its rows are rows of W'^T's product (forward), or its columns are
// (grad_input), which ldmatrix transposes.
enum class Weight { rows, columns };

// W at the lane's rows g, g + 8 and depths 2t, 2t + 1, 2t + 8, 2t + 9: near depths of both rows, then
// the far ones.
template <Weight kWeight>
RLRR_DEVICE void load_weight(uint32_t (&w)[4], const char* box, int depth, const Lane& l) {
  if constexpr (kWeight == Weight::rows) {
    ptx::ldmatrix(w, box + swizzled(16 * l.warp + l.index % 16, depth / 8 + l.index / 16));
  } else {
    ptx::ldmatrix_trans(w, box + swizzled(depth + l.index / 16 * 8 + l.index % 8, 2 * l.warp + l.index / 8 % 2));
  }
}

// In float32, rounded once. `row_scales`: of rows g and g + 8; `depth_scales`: of the box's 64 depths.
template <class T, Weight kWeight>
RLRR_DEVICE void rescaled_weight(uint32_t (&a)[4], const char* box, int depth, const float (&row_scales)[2],
                                 const char* depth_scales, const Lane& l) {
  uint32_t w[4];
  load_weight<kWeight>(w, box, depth, l);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = ptx::load_shared<float2>(depth_scales + 4 * (depth + i / 2 * 8 + 2 * l.t));
    const float u = row_scales[i % 2];
    const float2 wide = ptx::widen2<T>(w[i]);
    a[i] = ptx::narrow2<T>(wide.x * ptx::fma(u, v.x, 1.0f), wide.y * ptx::fma(u, v.y, 1.0f));
  }
}

}  // namespace rlrr::hopper
