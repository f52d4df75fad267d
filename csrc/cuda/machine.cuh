// The machine as the kernels see it: `rlrr::ptx` has one function for each instruction that they use.
//
// nvcc gets these functions from ptx.cuh, any other compiler from a model of a GPU in tests/cuda_host, which is
// stricter than a GPU. The same source of the kernels thus runs on a CPU.
#pragma once

#include <cstdint>

#include "passes.h"

namespace rlrr {

constexpr int kThreads = 128;  // of each block
constexpr int kWarps = kThreads / 32;

// Raw bits, since a host compiler does not know CUDA's classes.
struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

}  // namespace rlrr

#ifdef __CUDACC__
#include "ptx.cuh"
#else
#include <machine_model.h>
#endif

namespace rlrr {

template <class T>
constexpr Dtype kDtype = Dtype::float32;
template <>
inline constexpr Dtype kDtype<fp16> = Dtype::float16;
template <>
inline constexpr Dtype kDtype<bf16> = Dtype::bfloat16;

template <class T>
RLRR_DEVICE float widen(T value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return ptx::widen2<T>(value.bits).x;
  }
}

template <class T>
RLRR_DEVICE T narrow(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return T{static_cast<uint16_t>(ptx::narrow2<T>(value, 0.0f))};
  }
}

// Loads an element of a tensor whose dtype is only known at run time.
RLRR_DEVICE float load_float(const void* data, int64_t index, Dtype dtype) {
  if (dtype == Dtype::float32) return ptx::load(static_cast<const float*>(data) + index);
  if (dtype == Dtype::float16) return widen(ptx::load(static_cast<const fp16*>(data) + index));
  return widen(ptx::load(static_cast<const bf16*>(data) + index));
}

}  // namespace rlrr
