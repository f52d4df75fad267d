// Shared memory to fragments: the left operand (16 rows), the right one (two tiles of 8 columns), and
// the values of W from which a right operand is made.
//
// ldmatrix hands out rows of 16 bytes; a tile whose rows run along the other index than depth is
// transposed on the way, which the instruction can do for 16-bit elements only. Float32 is then read
// value by value.
#pragma once

#include "math.cuh"

namespace rlrr {

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

// W's values as a lane needs them for two tiles of 8 columns, in float32.
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

// Two right operands for a product that rescales nothing.
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
