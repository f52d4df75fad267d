// From sums to the result of forward and grad_input.
//
// W' is the left operand, the only one that wgmma takes from registers. The product of rows by tokens
// is therefore the transpose of what is stored; stmatrix turns it round on the way out.
#pragma once

#include "../numeric.cuh"
#include "product.cuh"

namespace rlrr::hopper {

// Rounds the sums and stores them, 64 tokens at a time: 16 bytes a lane, 128 a token.
template <class T, int kTokens>
RLRR_DEVICE void store_tile(const ptx::Products<kTokens>& sums, const Product& p, const ProductTile& tile,
                            char* staging, const Lane& l) {
  const int row = tile.row + kBox * l.consumer, thread = 32 * l.warp + l.index;
  float term[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = row + 16 * l.warp + l.g + 8 * i;
    if (at >= tile.row_end) continue;
    if (p.bias.data) term[i] = load_float(p.bias.data, at, p.bias.dtype);
    if (p.shift.data) term[i] += load_float(p.shift.data, at, p.shift.dtype);
  }
#pragma unroll
  for (int part = 0; part < kTokens / kBox; ++part) {
#pragma unroll
    for (int tokens = 0; tokens < kBox; tokens += 16) {
      const float* from = sums + (part * kBox + tokens) / 2;
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = ptx::narrow2<T>(from[2 * i] + term[i % 2], from[2 * i + 1] + term[i % 2]);
      ptx::stmatrix_trans(staging + swizzled(tokens + l.index / 16 * 8 + l.index % 8, 2 * l.warp + l.index / 8 % 2), r);
    }
    ptx::named_barrier(1 + l.consumer, kWarpgroup);
    const int chunk = thread % 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int in_part = thread / 8 + 16 * i;
      const int64_t token = tile.token + part * kBox + in_part;
      if (token < p.token_count && row + 8 * chunk < tile.row_end) {
        char* to = p.out + (token * p.out_stride + row + 8 * chunk) * 2;
        ptx::store(reinterpret_cast<float4*>(to), ptx::load_shared<float4>(staging + swizzled(in_part, chunk)));
      }
    }
    // read by all before the next part overwrites it
    ptx::named_barrier(1 + l.consumer, kWarpgroup);
  }
}

}  // namespace rlrr::hopper
