// The ring of stages between the warp that fetches and the warps that multiply.
//
// A stage's `full` barrier completes when its boxes have landed, its `empty` barrier when every warp
// that reads it has arrived. Both sides walk the ring in the same order for as long as the block
// lives, across tiles: a phase is one turn of the ring.
#pragma once

#include "machine.cuh"

namespace rlrr::hopper {

template <int kStages>
struct Ring {
  Barrier full[kStages];
  Barrier empty[kStages];

  RLRR_DEVICE void init(int readers) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::init(&full[stage], 1);
      ptx::init(&empty[stage], readers);
    }
    ptx::publish_barriers();
  }
};

// A side's place in the ring.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  RLRR_DEVICE void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

  // For the fetching side: whoever waits for the phase before the first one goes straight on.
  RLRR_DEVICE Barrier* claim(Ring<kStages>& ring, int bytes) const {
    ptx::wait(&ring.empty[stage], phase ^ 1, "empty", stage);
    ptx::arrive_and_expect(&ring.full[stage], bytes);
    return &ring.full[stage];
  }
  // For the reading side: one arrival a warp.
  RLRR_DEVICE void await(Ring<kStages>& ring) const { ptx::wait(&ring.full[stage], phase, "full", stage); }
  RLRR_DEVICE void release(Ring<kStages>& ring) const {
    ptx::warp_barrier();
    if (ptx::thread() % 32 == 0) ptx::arrive(&ring.empty[stage]);
  }
};

}  // namespace rlrr::hopper
