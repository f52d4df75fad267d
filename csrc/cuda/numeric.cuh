// The three element types and the conversions between them and float32.
#pragma once

#include "machine.cuh"
#include "problem.h"

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

// An element of a tensor whose dtype is known at run time only.
RLRR_DEVICE float load_float(const void* data, int64_t index, Dtype dtype) {
  if (dtype == Dtype::float32) return ptx::load(static_cast<const float*>(data) + index);
  if (dtype == Dtype::float16) return widen(ptx::load(static_cast<const fp16*>(data) + index));
  return widen(ptx::load(static_cast<const bf16*>(data) + index));
}

}  // namespace rlrr
