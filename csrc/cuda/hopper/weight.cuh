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

// Where in a box a lane's row of the first 16 of depth lies.
template <Weight kWeight>
RLRR_DEVICE int weight_offset(const Lane& l) {
  if constexpr (kWeight == Weight::rows) {
    return swizzled(16 * l.warp + l.index % 16, l.index / 16);
  } else {
    return swizzled(l.index / 16 * 8 + l.index % 8, 2 * l.warp + l.index / 8 % 2);
  }
}

// W at the lane's rows g, g + 8 and depths 2t, 2t + 1, 2t + 8, 2t + 9 of the box's 16 * part on: near depths of
// both rows, then the far ones. Along a row the next 16 are two chunks on, which is a bit that the swizzle's xor
// leaves where it is.
template <Weight kWeight>
RLRR_DEVICE void load_weight(uint32_t (&w)[4], const char* box, int offset, int part) {
  if constexpr (kWeight == Weight::rows) {
    ptx::ldmatrix(w, box + (offset ^ 16 * 2 * part));
  } else {
    ptx::ldmatrix_trans(w, box + offset + 16 * kRowBytes * part);
  }
}

// In float32, rounded once. `row_scales`: of rows g and g + 8; `depth_scales`: of the box's 64 depths.
template <class T, Weight kWeight>
RLRR_DEVICE void rescaled_weight(uint32_t (&a)[4], const char* box, int offset, int part, const float (&row_scales)[2],
                                 const char* depth_scales, const Lane& l) {
  uint32_t w[4];
  load_weight<kWeight>(w, box, offset, part);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = ptx::load_shared<float2>(depth_scales + 4 * (16 * part + i / 2 * 8 + 2 * l.t));
    const float u = row_scales[i % 2];
    const float2 wide = ptx::widen2<T>(w[i]);
    a[i] = ptx::narrow2<T>(wide.x * ptx::fma(u, v.x, 1.0f), wide.y * ptx::fma(u, v.y, 1.0f));
  }
}

}  // namespace rlrr::hopper
