// Copies run kStages - 1 steps ahead of the products that use them.
#pragma once

#include "machine.cuh"

namespace rlrr {

// Calls copy(stage) and multiply(stage) once for each step, in order; copy only starts copies or
// stores to its stage, multiply only reads it.
template <int kStages, class Copy, class Multiply>
RLRR_DEVICE void pipeline(int steps, const Copy& copy, const Multiply& multiply) {
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) copy(stage);
    ptx::commit_copies();
  }
  int stage = 0, stage_to_fill = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    ptx::wait_copies<kStages - 2>();
    // a thread's wait covers its own copies only; and the stage filled next must have been read by all
    ptx::barrier();
    if (step + kStages - 1 < steps) copy(stage_to_fill);
    // committed even if empty, so that counting groups stays counting steps
    ptx::commit_copies();
    multiply(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    stage_to_fill = stage_to_fill + 1 == kStages ? 0 : stage_to_fill + 1;
  }
}

}  // namespace rlrr
