// The kernel of forward and grad_input: who does what in a block, and its launch.
#pragma once

#include "multiply.cuh"
#include "store.cuh"

namespace rlrr::hopper {

template <Weight kWeight>
RLRR_DEVICE void fetch(const Product& p, ProductMemory& s) {
  ptx::prefetch(p.weight), ptx::prefetch(p.tokens), ptx::prefetch(p.depth_scales);
  Place<kProductStages> place;
  const int steps = p.segments * segment_steps(p);
  for (int64_t index = ptx::block(); index < p.tiles; index += ptx::blocks()) {
    const ProductTile tile = tile_at(p, index);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, place.next()) {
      const int stage = place.stage, depth = step * kBox;
      Barrier* full = place.claim(s.ring, ProductMemory::kStageBytes);
      for (int half = 0; half < kConsumers; ++half) {
        const int row = tile.row + half * kBox;
        if constexpr (kWeight == Weight::rows) {
          ptx::copy_box(s.weight[stage][half], p.weight, row, depth, full);
        } else {
          ptx::copy_box(s.weight[stage][half], p.weight, depth, row, full);
        }
      }
      ptx::copy_box(s.tokens[stage], p.tokens, static_cast<int>(tile.token), depth, full);
      ptx::copy_box(s.depth_scales[stage], p.depth_scales, tile.group, depth, full);
    }
  }
}

template <class T, Weight kWeight>
RLRR_HOPPER_KERNEL product_kernel(RLRR_PARAMETER Product p) {
  ProductMemory& s = *reinterpret_cast<ProductMemory*>(ptx::swizzled_shared_memory());
  if (ptx::thread() == 0) s.ring.init(kConsumers * kWarpgroup / 32);
  ptx::barrier();
  if (ptx::thread() < kWarpgroup) {
    ptx::give_registers<kProducerRegisters>();
    if (ptx::thread() == 0) fetch<kWeight>(p, s);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    Multiplication<T, kWeight> multiplication{p, s};
    for (int64_t index = ptx::block(); index < p.tiles; index += ptx::blocks()) {
      const ProductTile tile = tile_at(p, index);
      multiplication.multiply_tile(tile);
      store_tile<T>(multiplication.sums, p, tile, s.staging[multiplication.l.consumer], multiplication.l);
    }
  }
}

// One block a multiprocessor, or fewer where there are fewer tiles.
template <Weight kWeight>
cudaError_t launch_product(Product& p, Dtype dtype, const Device& device, cudaStream_t stream) {
  p.tiles = (p.token_count + kTileCols - 1) / kTileCols * p.row_groups * ((p.group_rows + kTileRows - 1) / kTileRows);
  const int blocks = static_cast<int>(p.tiles < device.multiprocessors ? p.tiles : device.multiprocessors);
  constexpr int kBytes = sizeof(ProductMemory);
  return dtype == Dtype::float16 ? ptx::launch_warpgroups<product_kernel<fp16, kWeight>>(blocks, kBytes, stream, p)
                                 : ptx::launch_warpgroups<product_kernel<bf16, kWeight>>(blocks, kBytes, stream, p);
}

}  // namespace rlrr::hopper
