// The kernel of forward and grad_input: rows of W' times tokens, summed over the depth.
//
// In forward the rows are N and the depth is K; in grad_input it is the other way round. In both, S at a row and a
// depth is 1 + row_scale * depth_scale. The rows of forward fall into groups with different depth scales, the depth of
// grad_input into segments with different row scales. Blocks are persistent: each computes one tile after another.
#pragma once

#include "tensor_map.h"
#include "warpgroups.cuh"

namespace rlrr::hopper {

// The number of tokens of a tile. The wide tile rescales each value of W for twice as many.
constexpr int kWideTile = 256, kNarrowTile = 128;

// Estimates in cycles, none of them measured. A step of 64 of depth takes the tensor cores 1024 or 512 cycles; in
// narrow tiles the instructions that rescale W take nearly as long. The start and the end of a tile are extra.
constexpr int64_t kWideStepCycles = 1024, kNarrowStepCycles = 600, kTileCycles = 1500;

// `row_tiles`: the number of tiles for the same tokens; `steps`: the number of steps of a tile.
inline int tile_tokens(int64_t tokens, int64_t row_tiles, int64_t steps, const Device& device) {
  const auto cycles = [&](int64_t width, int64_t step_cycles) {
    const int64_t tiles = (tokens + width - 1) / width * row_tiles;
    return (tiles + device.multiprocessors - 1) / device.multiprocessors * (kTileCycles + steps * step_cycles);
  };
  return cycles(kWideTile, kWideStepCycles) <= cycles(kNarrowTile, kNarrowStepCycles) ? kWideTile : kNarrowTile;
}

constexpr int kProductStages = 4;

struct Product {
  CUtensorMap weight;        // boxes of 64 x 64
  CUtensorMap tokens;        // boxes of the tokens of a tile x 64 of depth
  CUtensorMap depth_scales;  // a row for each group
  const float* row_scales;
  int64_t row_scale_stride;  // from one segment to the next
  int row_groups, group_rows;
  int segments, segment;  // if there are several, their length is a multiple of 64
  int64_t token_count;
  Vector bias, shift;  // of rows
  char* out;           // [tokens, rows]
  int64_t out_stride;
  int64_t tiles;
};

template <int kTokens>
struct ProductMemory {
  char weight[kProductStages][kConsumers][kBoxBytes];
  char tokens[kProductStages][kTokens * kRowBytes];
  char staging[kConsumers][kBoxBytes];
  char depth_scales[kProductStages][kBox * 4];
  Ring<kProductStages> ring;

  static constexpr int kStageBytes = kConsumers * kBoxBytes + kTokens * kRowBytes + kBox * 4;
};

struct ProductTile {
  int64_t token;
  int group, row, row_end;
};

// Rows run fastest: the tiles that are computed at a time share a few tiles of tokens, and all of W, which fits in L2.
template <int kTokens>
RLRR_DEVICE ProductTile tile_at(const Product& p, int64_t index) {
  const int of_group = (p.group_rows + kTileRows - 1) / kTileRows, of_rows = p.row_groups * of_group;
  const int tile = static_cast<int>(index % of_rows), group = tile / of_group;
  return {index / of_rows * kTokens, group, group * p.group_rows + tile % of_group * kTileRows,
          (group + 1) * p.group_rows};
}
RLRR_DEVICE int segment_steps(const Product& p) { return (p.segment + kBox - 1) / kBox; }

// W * (1 + u v) is the left operand of wgmma. It exists in registers only, four in each lane, for 64 rows by 16 of
// depth of a warpgroup at a time.

// Whether the rows of the product are rows of W (forward) or its columns (grad_input), which ldmatrix transposes.
enum class Weight { rows, columns };

// The offset in a box of the row that a lane passes to ldmatrix for the first 16 of depth.
template <Weight kWeight>
RLRR_DEVICE int weight_offset(const Lane& l) {
  if constexpr (kWeight == Weight::rows) {
    return swizzled(16 * l.warp + l.index % 16, l.index / 16);
  } else {
    return swizzled(l.index / 16 * 8 + l.index % 8, 2 * l.warp + l.index / 8 % 2);
  }
}

// Loads W at rows g and g + 8 and, from depth 16 * part of the box on, at depths 2t, 2t + 1 of both rows, then at 2t +
// 8, 2t + 9. Along a row the next 16 of depth are two chunks further: a bit that the xor of the swizzle does not carry
// over.
template <Weight kWeight>
RLRR_DEVICE void load_weight(uint32_t (&w)[4], const char* box, int offset, int part) {
  if constexpr (kWeight == Weight::rows) {
    ptx::ldmatrix(w, box + (offset ^ 16 * 2 * part));
  } else {
    ptx::ldmatrix_trans(w, box + offset + 16 * kRowBytes * part);
  }
}

// Rescales in float32 and rounds once. `row_scales`: of rows g and g + 8; `depth_scales`: of the 64 depths of the box.
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

RLRR_DEVICE void load_row_scales(float (&to)[2], const Product& p, int segment, int row, int row_end) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool inside = row + 8 * i < row_end;
    to[i] = inside ? ptx::load(p.row_scales + segment * p.row_scale_stride + row + 8 * i) : 0.0f;
  }
}

// The loop over the depth: W' is formed in registers while the tensor cores multiply.
//
// A step takes about 185 instructions a warp (175 in narrow tiles), and each scheduler has two such warps: 370 issue
// slots in the 1024 (512) cycles that the tensor cores take for the products of both warpgroups. Rescaling costs no
// time as long as products overlap. In SASS (nvcc -cubin, nvdisasm -c) the step is the loop around four HGMMA, each
// followed by WARPGROUP.DEPBAR.LE gsb0, 0x3; 0x0 would mean that no product overlaps.
// tests/cuda_host/test_sass.py checks this.
template <class T, Weight kWeight, int kTokens>
struct Multiplication {
  static constexpr int kParts = kBox / 16;  // products of a step
  // The operand of one product is formed while the others run, in the registers of the oldest.
  static constexpr int kInFlight = kParts - 1;

  const Product& p;
  ProductMemory<kTokens>& s;
  const Lane l = lane();
  Place<kProductStages> place = {}, multiplied = {};  // the second is one step behind
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

  // The order must be product, wait, next operand, without a branch on whether there is a next step: otherwise ptxas
  // sees an operand change during a product, and lets no products overlap (C7513). If a wait is too short, ptxas does
  // not notice, and reuses registers that are still being read.
  template <bool kFirst, bool kLast>
  RLRR_DEVICE void multiply_step() {
    const uint64_t tokens = matrix_descriptor(s.tokens[place.stage], 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      ptx::multiply<T>(sums, a[part], tokens + part * kAlongRow);
      ptx::wait_products<kInFlight>();
      // all products that still run belong to this step
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

// Rounds the sums and stores them, 64 tokens at a time: 16 bytes a lane, 128 a token.
//
// wgmma takes only its left operand from registers, so that W' must be the left one. The sums are therefore the
// transpose of the result; stmatrix transposes them back.
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
    // all must have read it before the next part overwrites it
    ptx::named_barrier(1 + l.consumer, kWarpgroup);
  }
}

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

// Launches one block for each multiprocessor, or for each tile if there are fewer. `tokens`: x or dy, [tokens, depth].
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
