// The functions of csrc/cuda/ptx.cuh on the model of a GPU. Included by csrc/cuda/machine.cuh.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstring>

#include "instructions.h"
#include "model.h"

#define RLRR_DEVICE inline
#define RLRR_KERNEL(...) inline void
#define RLRR_PARAMETER const

namespace rlrr::model {
inline int64_t blocks_launched = 0;
}

namespace rlrr::ptx {

inline int thread() { return model::thread(); }
inline int block() { return model::block(); }
inline void barrier() { model::barrier(); }
inline char* shared_memory() { return model::shared_memory(); }

template <class T>
T load(const T* global) {
  model::check_global(global, sizeof(T), alignof(T), false);
  return *global;
}
template <class T>
void store(T* global, T value) {
  model::check_global(global, sizeof(T), alignof(T), true);
  *global = value;
}
template <class T>
T load_shared(const char* shared) {
  model::check_shared(shared, sizeof(T), alignof(T));
  T value;
  std::memcpy(&value, shared, sizeof(T));
  return value;
}
template <class T>
void store_shared(char* shared, T value) {
  model::check_shared(shared, sizeof(T), alignof(T));
  std::memcpy(shared, &value, sizeof(T));
}

template <int kBytes>
void copy_async(char* shared, const void* global, int bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  model::copy_async(shared, global, bytes, kBytes);
}
template <int kBytes>
void copy_async(char* shared, const void* global) {
  copy_async<kBytes>(shared, global, kBytes);
}
inline void commit_copies() { model::commit_copies(); }
template <int kPending>
void wait_copies() {
  model::wait_copies(kPending);
}

inline void ldmatrix(uint32_t (&r)[4], const char* shared) { model::together(model::Ldmatrix<false>{r, shared}); }
inline void ldmatrix_trans(uint32_t (&r)[4], const char* shared) { model::together(model::Ldmatrix<true>{r, shared}); }

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  model::together(model::MmaHalf<T>{c, a, b});
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  model::together(model::MmaTf32{c, a, b});
}
inline float shuffle_xor(float value, int lanes) {
  float received;
  model::together(model::ShuffleXor{value, lanes, &received});
  return received;
}

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t bits(float value) { return model::bits(value); }
inline float from_bits(uint32_t value) { return model::from_bits(value); }

// To the nearest, ties away from zero.
inline uint32_t round_tf32(float value) {
  const uint32_t raw = bits(value);
  return std::isfinite(value) ? (raw + 0x1000u) & ~0x1fffu : raw;
}
template <class T>
uint32_t narrow2(float low, float high) {
  return model::narrow(low, T{}) | static_cast<uint32_t>(model::narrow(high, T{})) << 16;
}
template <class T>
float2 widen2(uint32_t packed) {
  return {model::widen(T{static_cast<uint16_t>(packed)}), model::widen(T{static_cast<uint16_t>(packed >> 16)})};
}

template <auto kKernel, class Parameters>
cudaError_t launch(int64_t blocks, int shared_bytes, cudaStream_t, const Parameters& parameters) {
  model::blocks_launched += blocks;
  return model::run_grid(
      blocks, kThreads, shared_bytes, 99 * 1024, [](const void* p) { kKernel(*static_cast<const Parameters*>(p)); },
      &parameters);
}

}  // namespace rlrr::ptx
