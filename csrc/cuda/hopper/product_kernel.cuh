// The kernel of forward and grad_input: who does what in a block, and its launch.
#pragma once

#include "multiply.cuh"
#include "store.cuh"
#include "tensor_map.h"

namespace rlrr::hopper {

template <Weight kWeight, int kTokens>
RLRR_DEVICE void fetch(const Product& p, ProductMemory<kTokens>& s) {
  ptx::prefetch(p.weight), ptx::prefetch(p.tokens), ptx::prefetch(p.depth_scales);
  Place<kProductStages> place;
  const int steps = p.segments * segment_steps(p);
  for (int64_t index = ptx::block(); index < p.tiles; index += ptx::blocks()) {
    const ProductTile tile = tile_at<kTokens>(p, index);
#pragma unroll 1
    for (int step = 0; step < steps; ++step, place.next()) {
      const int stage = place.stage, depth = step * kBox;
      Barrier* full = place.claim(s.ring, ProductMemory<kTokens>::kStageBytes);
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

template <class T, Weight kWeight, int kTokens>
RLRR_HOPPER_KERNEL product_kernel(RLRR_PARAMETER Product p) {
  auto& s = *reinterpret_cast<ProductMemory<kTokens>*>(ptx::swizzled_shared_memory());
  if (ptx::thread() == 0) s.ring.init(kConsumers * kWarpgroup / 32);
  ptx::barrier();
  if (ptx::thread() < kWarpgroup) {
    ptx::give_registers<kProducerRegisters>();
    if (ptx::thread() == 0) fetch<kWeight>(p, s);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    Multiplication<T, kWeight, kTokens> multiplication{p, s};
    for (int64_t index = ptx::block(); index < p.tiles; index += ptx::blocks()) {
      const ProductTile tile = tile_at<kTokens>(p, index);
      multiplication.multiply_tile(tile);
      store_tile<T, kTokens>(multiplication.sums, p, tile, s.staging[multiplication.l.consumer], multiplication.l);
    }
  }
}

template <class T, Weight kWeight, int kTokens>
cudaError_t launch_tiles(const Product& p, int blocks, cudaStream_t stream) {
  return ptx::launch_warpgroups<product_kernel<T, kWeight, kTokens>>(blocks, sizeof(ProductMemory<kTokens>), stream, p);
}

// One block a multiprocessor, or fewer where there are fewer tiles. `tokens`: x or dy, [tokens, depth].
template <Weight kWeight>
cudaError_t launch_product(Product& p, const Matrix& tokens, const Device& device, cudaStream_t stream) {
  const int64_t row_tiles = int64_t{p.row_groups} * ((p.group_rows + kTileRows - 1) / kTileRows);
  const int64_t depth = int64_t{p.segments} * p.segment, steps = int64_t{p.segments} * ((p.segment + kBox - 1) / kBox);
  const int width = tile_tokens(p.token_count, row_tiles, steps, device);
  const cudaError_t error = describe(p.tokens, tokens, p.token_count, depth, width);
  if (error != cudaSuccess) return error;
  p.tiles = (p.token_count + width - 1) / width * row_tiles;
  const int blocks = static_cast<int>(p.tiles < device.multiprocessors ? p.tiles : device.multiprocessors);
  const bool wide = width == kWideTile;
  if (tokens.dtype == Dtype::float16)
    return wide ? launch_tiles<fp16, kWeight, kWideTile>(p, blocks, stream)
                : launch_tiles<fp16, kWeight, kNarrowTile>(p, blocks, stream);
  return wide ? launch_tiles<bf16, kWeight, kWideTile>(p, blocks, stream)
              : launch_tiles<bf16, kWeight, kNarrowTile>(p, blocks, stream);
}

}  // namespace rlrr::hopper
