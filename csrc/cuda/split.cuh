// A product whose depth is split among blocks: where their sums lie, and the second kernel, which adds
// them in a fixed order and finishes the result.
//
// Each split leaves float32 sums of its own, so that the result is rounded once, and two runs agree bit
// for bit; blocks need no counters, which someone would have to set to zero, and wait for nobody.
#pragma once

#include "numeric.cuh"

namespace rlrr {

struct SplitSums {
  const float* partials;  // [splits, m, n]
  int splits;
  Vector bias, shift;  // [n] each, or absent
  void* result;        // [m, n]
  int64_t row_stride;
  int m, n;
};

RLRR_DEVICE float column_term(const Vector& bias, const Vector& shift, int64_t column) {
  const float term = bias.data ? load_float(bias.data, column, bias.dtype) : 0.0f;
  return term + (shift.data ? load_float(shift.data, column, shift.dtype) : 0.0f);
}

// Four neighbours a thread: one 16-byte load a split.
template <class T>
RLRR_DEVICE void add_vectors(const SplitSums& s) {
  const int at = 4 * (ptx::block() * kThreads + ptx::thread()), stride = s.m * s.n;
  if (at >= stride) return;
  const int row = at / s.n, column = at % s.n;
  float4 sum = ptx::load(reinterpret_cast<const float4*>(s.partials + at));
#pragma unroll 4
  for (int split = 1; split < s.splits; ++split) {
    const float4 more = ptx::load(reinterpret_cast<const float4*>(s.partials + split * stride + at));
    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
  }
  sum.x += column_term(s.bias, s.shift, column), sum.y += column_term(s.bias, s.shift, column + 1);
  sum.z += column_term(s.bias, s.shift, column + 2), sum.w += column_term(s.bias, s.shift, column + 3);
  T* to = static_cast<T*>(s.result) + row * s.row_stride + column;
  if constexpr (sizeof(T) == 4) {
    ptx::store(reinterpret_cast<float4*>(to), sum);
  } else {
    const float2 packed = {ptx::from_bits(ptx::narrow2<T>(sum.x, sum.y)),
                           ptx::from_bits(ptx::narrow2<T>(sum.z, sum.w))};
    ptx::store(reinterpret_cast<float2*>(to), packed);
  }
}

template <class T>
RLRR_DEVICE void add_elements(const SplitSums& s) {
  const int at = ptx::block() * kThreads + ptx::thread(), stride = s.m * s.n;
  if (at >= stride) return;
  const int row = at / s.n, column = at % s.n;
  float sum = ptx::load(s.partials + at);
#pragma unroll 4
  for (int split = 1; split < s.splits; ++split) sum += ptx::load(s.partials + split * stride + at);
  sum += column_term(s.bias, s.shift, column);
  ptx::store(static_cast<T*>(s.result) + row * s.row_stride + column, narrow<T>(sum));
}

// Static, as two files include it.
template <class T, bool kVectors>
static RLRR_KERNEL(2) add_splits_kernel(RLRR_PARAMETER SplitSums s) {
  if constexpr (kVectors) {
    add_vectors<T>(s);
  } else {
    add_elements<T>(s);
  }
}

template <class T>
static cudaError_t add_splits(const SplitSums& s, cudaStream_t stream) {
  const auto aligned = [](const void* data, int bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; };
  const bool vectors =
      s.n % 4 == 0 && s.row_stride % 4 == 0 && aligned(s.result, 4 * sizeof(T)) && aligned(s.partials, 16);
  const int a_block = kThreads * (vectors ? 4 : 1), blocks = (s.m * s.n + a_block - 1) / a_block;
  return vectors ? ptx::launch<add_splits_kernel<T, true>>(blocks, 0, stream, s)
                 : ptx::launch<add_splits_kernel<T, false>>(blocks, 0, stream, s);
}

}  // namespace rlrr
