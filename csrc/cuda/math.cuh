// The three kinds of arithmetic behind one interface: 16-bit and TF32 tensor cores, and plain float32; and how their
// fragments are loaded from shared memory.
//
// Each kind defines the depth of a step, the values that a lane holds of a left operand (16 rows) and of a right one (8
// columns), and their depths and columns. Layouts are those of the fragments of mma.sync in the PTX manual.
#pragma once

#include "tile.cuh"

namespace rlrr {

template <class T>
struct HalfMath {
  using Element = T;
  static constexpr bool kTensorCores = true;
  static constexpr int kDepth = 16;   // of a step
  static constexpr int kDepths = 4;   // that a lane holds: 2t, 2t + 1, 2t + 8, 2t + 9
  static constexpr int kColumns = 1;  // that a lane holds of 8: g

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
  RLRR_DEVICE static void round(Left&) {}  // exact already
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
  // Both operands are rounded to nearest: truncation shrinks all values, an error that sums do not average out.
  RLRR_DEVICE static void round(Left& a) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a.r[i] = ptx::round_tf32(ptx::from_bits(a.r[i]));
  }
  RLRR_DEVICE static Right right(const float (&w)[kColumns][kDepths]) {
    return {{ptx::round_tf32(w[0][0]), ptx::round_tf32(w[0][1])}};
  }
  RLRR_DEVICE static void multiply_add(float (&acc)[4], const Left& a, const Right& b) { ptx::mma_tf32(acc, a.r, b.r); }
};

// A lane multiplies whole rows by whole columns for its own accumulators; lanes exchange nothing.
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

// Blocks whose registers must fit a multiprocessor at once. A large tile takes nearly all registers that a thread can
// have. Of small tiles four fit with tensor cores; plain float32 needs more registers.
template <class Math, class Tile>
constexpr int kBlocks = Math::kTensorCores && Tile::kRows == 64 ? 4 : 2;

// From shared memory to fragments: of a left operand 16 rows, of a right one two tiles of 8 columns.
//
// ldmatrix loads rows of 16 bytes. A tile whose rows do not run along the depth must be transposed, which ldmatrix can
// do for 16-bit elements only; float32 is then read value by value.

template <Inner kInner, class T, class Shared>
RLRR_DEVICE typename HalfMath<T>::Left load_left(HalfMath<T>, const Shared& s, int row, int depth, const Lane& l) {
  typename HalfMath<T>::Left a;
  if constexpr (kInner == Inner::depth) {
    ptx::ldmatrix(a.r, s.at(row + l.index % 16, depth + l.index / 16 * 8));
  } else {
    ptx::ldmatrix_trans(a.r, s.at(depth + l.index / 16 * 8 + l.index % 8, row + l.index / 8 % 2 * 8));
  }
  return a;
}

template <Inner kInner, class T, class Shared>
RLRR_DEVICE void load_right(HalfMath<T>, uint32_t (&r)[4], const Shared& s, int col, int depth, const Lane& l) {
  if constexpr (kInner == Inner::depth) {
    ptx::ldmatrix(r, s.at(col + l.index / 16 * 8 + l.index % 8, depth + l.index / 8 % 2 * 8));
  } else {
    ptx::ldmatrix_trans(r, s.at(depth + l.index % 16, col + l.index / 16 * 8));
  }
}

template <Inner kInner, class Shared>
RLRR_DEVICE Tf32Math::Left load_left(Tf32Math, const Shared& s, int row, int depth, const Lane& l) {
  Tf32Math::Left a;
  if constexpr (kInner == Inner::depth) {
    ptx::ldmatrix(a.r, s.at(row + l.index % 16, depth + l.index / 16 * 4));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a.r[i] = ptx::load_shared<uint32_t>(s.at(depth + l.t + i / 2 * 4, row + l.g + i % 2 * 8));
  }
  return a;
}

template <Inner kInner, class Shared>
RLRR_DEVICE void load_right(Tf32Math, uint32_t (&r)[4], const Shared& s, int col, int depth, const Lane& l) {
  if constexpr (kInner == Inner::depth) {
    ptx::ldmatrix(r, s.at(col + l.index / 16 * 8 + l.index % 8, depth + l.index / 8 % 2 * 4));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = ptx::load_shared<uint32_t>(s.at(depth + l.t + i % 2 * 4, col + l.g + i / 2 * 8));
  }
}

template <Inner kInner, class Shared>
RLRR_DEVICE PlainMath::Left load_left(PlainMath, const Shared& s, int row, int depth, const Lane& l) {
  PlainMath::Left a;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kInner == Inner::depth) {
      const float4 all = ptx::load_shared<float4>(s.at(row + l.g + 8 * i, depth));
      a.r[i][0] = all.x, a.r[i][1] = all.y, a.r[i][2] = all.z, a.r[i][3] = all.w;
    } else {
#pragma unroll
      for (int d = 0; d < 4; ++d) a.r[i][d] = ptx::load_shared<float>(s.at(depth + d, row + l.g + 8 * i));
    }
  }
  return a;
}

// The values of W that a lane needs for two tiles of 8 columns, in float32.
template <class Math>
using Values = float[2][Math::kColumns][Math::kDepths];

template <Inner kInner, class T, class Shared>
RLRR_DEVICE void load_values(HalfMath<T> math, Values<HalfMath<T>>& w, const Shared& s, int col, int depth,
                             const Lane& l) {
  if constexpr (sizeof(typename Shared::Element) == 2) {
    uint32_t r[4];
    load_right<kInner>(math, r, s, col, depth, l);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = ptx::widen2<T>(r[i]);
      w[i / 2][0][i % 2 * 2] = pair.x, w[i / 2][0][i % 2 * 2 + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = col + l.g + i / 2 * 8, d = depth + 2 * l.t + i % 2 * 8;
      float* to = &w[i / 2][0][i % 2 * 2];
      if constexpr (kInner == Inner::depth) {
        const float2 pair = ptx::load_shared<float2>(s.at(c, d));
        to[0] = pair.x, to[1] = pair.y;
      } else {
        to[0] = ptx::load_shared<float>(s.at(d, c)), to[1] = ptx::load_shared<float>(s.at(d + 1, c));
      }
    }
  }
}

template <Inner kInner, class Shared>
RLRR_DEVICE void load_values(Tf32Math math, Values<Tf32Math>& w, const Shared& s, int col, int depth, const Lane& l) {
  uint32_t r[4];
  load_right<kInner>(math, r, s, col, depth, l);
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i / 2][0][i % 2] = ptx::from_bits(r[i]);
}

template <Inner kInner, class Shared>
RLRR_DEVICE void load_values(PlainMath, Values<PlainMath>& w, const Shared& s, int col, int depth, const Lane& l) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int c = col + 8 * tile + 2 * l.t;
    if constexpr (kInner == Inner::depth) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 all = ptx::load_shared<float4>(s.at(c + i, depth));
        w[tile][i][0] = all.x, w[tile][i][1] = all.y, w[tile][i][2] = all.z, w[tile][i][3] = all.w;
      }
    } else {
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const float2 pair = ptx::load_shared<float2>(s.at(depth + d, c));
        w[tile][0][d] = pair.x, w[tile][1][d] = pair.y;
      }
    }
  }
}

// Loads two right operands that are not rescaled.
template <class Math, class Shared>
RLRR_DEVICE void load_rights(Math math, typename Math::Right (&b)[2], const Shared& s, int col, int depth,
                             const Lane& l) {
  if constexpr (Math::kTensorCores && sizeof(typename Math::Element) == 2) {
    uint32_t r[4];
    load_right<Inner::other>(math, r, s, col, depth, l);
    b[0] = {{r[0], r[1]}}, b[1] = {{r[2], r[3]}};
  } else {
    Values<Math> w;
    load_values<Inner::other>(math, w, s, col, depth, l);
    b[0] = Math::right(w[0]), b[1] = Math::right(w[1]);
  }
}

}  // namespace rlrr
