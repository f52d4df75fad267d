// The three ways to multiply, behind one interface: 16-bit and TF32 tensor cores, and plain float32.
//
// Each says how deep a step is, which values a lane holds of a 16-row left operand and of an 8-column
// right operand, and at which depths and columns those values stand. Layouts are those of mma.sync's
// fragments in the PTX manual.
#pragma once

#include "numeric.cuh"
#include "tile.cuh"

namespace rlrr {

template <class T>
struct HalfMath {
  using Element = T;
  static constexpr bool kTensorCores = true;
  static constexpr int kDepth = 16;   // of a step
  static constexpr int kDepths = 4;   // how many of them a lane holds: 2t, 2t + 1, 2t + 8, 2t + 9
  static constexpr int kColumns = 1;  // of an 8-column tile: g

  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[2];
  };

  RLRR_DEVICE static int column(const Lane& l, int) { return l.g; }
  RLRR_DEVICE static void depth_values(float (&to)[kDepths], const char* vector, const Lane& l) {
    const float2 near = ptx::load_shared<float2>(vector + 4 * (2 * l.t));
    const float2 far = ptx::load_shared<float2>(vector + 4 * (2 * l.t + 8));
    to[0] = near.x, to[1] = near.y, to[2] = far.x, to[3] = far.y;
  }
  RLRR_DEVICE static void round(Left&) {}  // loaded as they are multiplied
  RLRR_DEVICE static Right right(const float (&w)[kColumns][kDepths]) {
    return {{ptx::narrow2<T>(w[0][0], w[0][1]), ptx::narrow2<T>(w[0][2], w[0][3])}};
  }
  RLRR_DEVICE static void multiply_add(float (&acc)[4], const Left& a, const Right& b) { ptx::mma<T>(acc, a.r, b.r); }
};

struct Tf32Math {
  using Element = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kDepth = 8;
  static constexpr int kDepths = 2;  // t, t + 4
  static constexpr int kColumns = 1;

  struct Left {
    uint32_t r[4];
  };
  struct Right {
    uint32_t r[2];
  };

  RLRR_DEVICE static int column(const Lane& l, int) { return l.g; }
  RLRR_DEVICE static void depth_values(float (&to)[kDepths], const char* vector, const Lane& l) {
    to[0] = ptx::load_shared<float>(vector + 4 * l.t);
    to[1] = ptx::load_shared<float>(vector + 4 * (l.t + 4));
  }
  // Both operands are rounded: values that are cut instead all shrink, and no length of sum averages that out.
  RLRR_DEVICE static void round(Left& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = ptx::round_tf32(ptx::from_bits(a.r[i]));
  }
  RLRR_DEVICE static Right right(const float (&w)[kColumns][kDepths]) {
    return {{ptx::round_tf32(w[0][0]), ptx::round_tf32(w[0][1])}};
  }
  RLRR_DEVICE static void multiply_add(float (&acc)[4], const Left& a, const Right& b) { ptx::mma_tf32(acc, a.r, b.r); }
};

// A lane multiplies whole rows by whole columns of its own accumulators: no exchange between lanes.
struct PlainMath {
  using Element = float;
  static constexpr bool kTensorCores = false;
  static constexpr int kDepth = 4;  // one 16-byte load
  static constexpr int kDepths = 4;
  static constexpr int kColumns = 2;

  struct Left {
    float r[2][kDepth];  // rows g, g + 8
  };
  struct Right {
    float r[kColumns][kDepth];  // columns 2t, 2t + 1
  };

  RLRR_DEVICE static int column(const Lane& l, int i) { return 2 * l.t + i; }
  RLRR_DEVICE static void depth_values(float (&to)[kDepths], const char* vector, const Lane&) {
    const float4 all = ptx::load_shared<float4>(vector);
    to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
  }
  RLRR_DEVICE static void round(Left&) {}
  RLRR_DEVICE static Right right(const float (&w)[kColumns][kDepths]) {
    Right b;
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
#pragma unroll
      for (int d = 0; d < kDepth; ++d) b.r[c][d] = w[c][d];
    return b;
  }
  RLRR_DEVICE static void multiply_add(float (&acc)[4], const Left& a, const Right& b) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) acc[2 * r + c] = ptx::fma(a.r[r][d], b.r[c][d], acc[2 * r + c]);
  }
};

// How many blocks the registers of a multiprocessor must hold at once. A large tile takes nearly all that a
// thread can have; small ones fit four times where tensor cores multiply, and need more in plain float32.
template <class Math, class Tile>
constexpr int kBlocks = Math::kTensorCores && Tile::kRows == 64 ? 4 : 2;

}  // namespace rlrr
