// The loop of forward and grad_input: W' is made in registers while the tensor cores multiply.
#pragma once

#include "product.cuh"
#include "weight.cuh"

namespace rlrr::hopper {

RLRR_DEVICE void load_row_scales(float (&to)[2], const Product& p, int segment, int row, int row_end) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = row + 8 * i < row_end;
    to[i] = inside ? ptx::load(p.row_scales + segment * p.row_scale_stride + row + 8 * i) : 0.0f;
  }
}

// What a multiplying warp carries from step to step of a tile.
//
// A step is about 185 instructions a warp (175 in narrow tiles), so 370 issue slots of a scheduler's two, beside
// the 1024 (512) cycles that the tensor cores take for both warpgroups' products: the rescaling hides behind them
// as long as products overlap. In SASS (nvcc -cubin, nvdisasm -c) the step is the loop around four HGMMA; each is
// followed by WARPGROUP.DEPBAR.LE gsb0, 0x3, where 0x0 would say that none runs on.
// tests/cuda_host/hopper/test_sass.py reads it.
template <class T, Weight kWeight, int kTokens>
struct Multiplication {
  static constexpr int kParts = kBox / 16;  // products a step
  // One product is made ready while the others run: its registers are those of the oldest.
  static constexpr int kInFlight = kParts - 1;

  const Product& p;
  ProductMemory<kTokens>& s;
  const Lane l = lane();
  Place<kProductStages> place = {}, multiplied = {};  // the second trails by a step
  int row, row_end;
  int segment, segment_left;
  float row_scales[2];
  uint32_t a[kParts][4];
  const int weight_at = weight_offset<kWeight>(l);
  ptx::Products<kTokens> sums;

  RLRR_DEVICE void make_operand(int part) {
    rescaled_weight<T, kWeight>(a[part], s.weight[place.stage][l.consumer], weight_at, part, row_scales,
                                s.depth_scales[place.stage], l);
  }
  RLRR_DEVICE void enter_stage() {
    if (segment_left == 0) {
      load_row_scales(row_scales, p, segment++, row, row_end);
      segment_left = segment_steps(p);
    }
    --segment_left;
    place.await(s.ring);
    make_operand(0);
  }
  RLRR_DEVICE void release_stage() {
    multiplied.release(s.ring);
    multiplied.next();
  }

  // In this order, product, wait, operand of the next, and without a branch on whether there is a next:
  // otherwise ptxas sees an operand change under a running product, and lets none overlap (C7513). It
  // does not see when a wait is too short; then it reuses registers that are still being read.
  template <bool kFirst, bool kLast>
  RLRR_DEVICE void multiply_step() {
    const uint64_t tokens = matrix_descriptor(s.tokens[place.stage], 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ptx::multiply<T>(sums, a[part], tokens + part * kAlongRow);
      ptx::wait_products<kInFlight>();
      // what still runs is of this step
      if (part == kInFlight - 1 && !kFirst) release_stage();
      if (part + 1 < kParts) make_operand(part + 1);
    }
    place.next();
    if constexpr (!kLast) enter_stage();
  }

  RLRR_DEVICE void multiply_tile(const ProductTile& tile) {
    row = tile.row + kBox * l.consumer + 16 * l.warp + l.g;
    row_end = tile.row_end;
    segment = segment_left = 0;
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    enter_stage();
    const int steps = p.segments * segment_steps(p);
    if (steps == 1) {
      multiply_step<true, true>();
    } else {
      multiply_step<true, false>();
#pragma unroll 1
      for (int step = 2; step < steps; ++step) multiply_step<false, false>();
      multiply_step<false, true>();
    }
    ptx::finish(sums);
    release_stage();
  }
};

}  // namespace rlrr::hopper
