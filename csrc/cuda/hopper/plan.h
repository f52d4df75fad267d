// Which tile a product takes on a Hopper GPU.
#pragma once

#include "../problem.h"

namespace rlrr::hopper {

// Tokens of a tile. The wide one rescales each value of W for twice as many.
constexpr int kWideTile = 256, kNarrowTile = 128;

// Estimates in cycles, good enough to choose by; nothing here has been measured. A step of 64 of depth takes
// the tensor cores 1024 and 512; in the narrow tile the instructions that rescale W leave them little slack.
// A tile's start and end come on top.
constexpr int64_t kWideStepCycles = 1024, kNarrowStepCycles = 600, kTileCycles = 1500;

// `row_tiles`: tiles side by side for the same tokens; `steps`: of each.
inline int tile_tokens(int64_t tokens, int64_t row_tiles, int64_t steps, const Device& device) {
  const auto cycles = [&](int64_t width, int64_t step_cycles) {
    const int64_t tiles = (tokens + width - 1) / width * row_tiles;
    return (tiles + device.multiprocessors - 1) / device.multiprocessors * (kTileCycles + steps * step_cycles);
  };
  return cycles(kWideTile, kWideStepCycles) <= cycles(kNarrowTile, kNarrowStepCycles) ? kWideTile : kNarrowTile;
}

}  // namespace rlrr::hopper
