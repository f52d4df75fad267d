// df, which is dy summed over the tokens, beside the products that use dy anyway.
#pragma once

#include "../numeric.cuh"
#include "gram.cuh"

namespace rlrr::hopper {

// Two warps of the fetching warpgroup, idle otherwise, add up the dy that is in shared
// memory anyway. The columns of G have no part in it, so only the first column of tiles sees to it.
constexpr int kAddingWarps = 2;

template <class T>
RLRR_DEVICE void add_tokens(const Gram& p, GramMemory& s) {
  const int pair = ptx::thread() - 32;  // of columns of dy
  Place<kGramStages> place;
  for (int index = ptx::block(); index < p.items; index += ptx::blocks()) {
    const GramItem item = item_at(p, index);
    float2 total = {0.0f, 0.0f};
#pragma unroll 1
    for (int step = 0; step < item.steps + 2; ++step, place.next()) {
      place.await(s.ring);
      if (item.col_tile == 0 && step < item.steps) {
        const char* box = s.boxes[place.stage][pair / 32];
        float2 sum = {0.0f, 0.0f};
#pragma unroll 1
        for (int token = 0; token < kBox; token += 8) {
          uint32_t pairs[8];  // all under way before the first is added
#pragma unroll
          for (int i = 0; i < 8; ++i)
            pairs[i] = ptx::load_shared<uint32_t>(box + token * kRowBytes + swizzled(i, pair % 32 / 4) + pair % 4 * 4);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float2 dy = ptx::widen2<T>(pairs[i]);
            sum.x += dy.x, sum.y += dy.y;
          }
        }
        total.x += sum.x, total.y += sum.y;
      }
      place.release(s.ring);
    }
    if (item.col_tile != 0) continue;
    float* df = p.df_partial + static_cast<int64_t>(item.split) * p.rows + item.row_in_slice + 2 * pair;
    const int rows = item.row_end - item.row - 2 * pair;
    if (rows > 0) ptx::store(df, total.x);
    if (rows > 1) ptx::store(df + 1, total.y);
  }
}

}  // namespace rlrr::hopper
