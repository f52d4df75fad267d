// The kernel of grad_scales: who does what in a block.
#pragma once

#include "gram_multiply.cuh"
#include "sum_tokens.cuh"

namespace rlrr::hopper {

RLRR_DEVICE void fetch(const Gram& p, GramMemory& s) {
  ptx::prefetch(p.dy), ptx::prefetch(p.x), ptx::prefetch(p.weight);
  Place<kGramStages> place;
  for (int index = ptx::block(); index < p.items; index += ptx::blocks()) {
    const GramItem item = item_at(p, index);
#pragma unroll 1
    for (int step = 0; step < item.steps; ++step, place.next()) {
      Barrier* full = place.claim(s.ring, GramMemory::kBoxes * kBoxBytes);
      auto& boxes = s.boxes[place.stage];
      const int token = (item.first_step + step) * kBox;
      for (int i = 0; i < GramMemory::kDyBoxes; ++i) ptx::copy_box(boxes[i], p.dy, token, item.row + i * kBox, full);
      for (int i = 0; i < GramMemory::kXBoxes; ++i)
        ptx::copy_box(boxes[GramMemory::kDyBoxes + i], p.x, token, item.col + i * kBox, full);
    }
    for (int half = 0; half < 2; ++half, place.next()) {
      Barrier* full = place.claim(s.ring, 2 * kConsumers * kBoxBytes);
      for (int i = 0; i < 2 * kConsumers; ++i)
        ptx::copy_box(s.boxes[place.stage][i], p.weight, item.row + i / 2 * kBox,
                      item.col + half * kTileCols / 2 + i % 2 * kBox, full);
    }
  }
}

template <class T>
RLRR_HOPPER_KERNEL gram_kernel(RLRR_PARAMETER Gram p) {
  GramMemory& s = *reinterpret_cast<GramMemory*>(ptx::swizzled_shared_memory());
  const int warp = ptx::thread() / 32;
  if (ptx::thread() == 0) s.ring.init(kMultiplyingWarps + (p.df_partial ? kAddingWarps : 0));
  ptx::barrier();
  if (ptx::thread() < kWarpgroup) {
    ptx::give_registers<kProducerRegisters>();
    if (ptx::thread() == 0) fetch(p, s);
    if (p.df_partial && warp >= 1 && warp <= kAddingWarps) add_tokens<T>(p, s);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    GramMultiplication<T> multiplication{p, s};
    for (int index = ptx::block(); index < p.items; index += ptx::blocks()) {
      const GramItem item = item_at(p, index);
      multiplication.multiply(item.steps);
      multiplication.reduce(item);
    }
  }
}

}  // namespace rlrr::hopper
