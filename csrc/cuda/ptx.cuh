// The functions of `rlrr::ptx` as PTX instructions, for sm_80 and later. Included by machine.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define RLRR_DEVICE __device__ __forceinline__
// The arguments: as __launch_bounds__ has them after the threads of a block.
#define RLRR_KERNEL(...) __global__ void __launch_bounds__(::rlrr::kThreads, __VA_ARGS__)
#define RLRR_PARAMETER const __grid_constant__

namespace rlrr::ptx {

RLRR_DEVICE int thread() { return threadIdx.x; }
RLRR_DEVICE int block() { return blockIdx.x; }
RLRR_DEVICE void barrier() { __syncthreads(); }

RLRR_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

template <class T>
RLRR_DEVICE T load(const T* global) {
  return *global;
}
template <class T>
RLRR_DEVICE void store(T* global, T value) {
  *global = value;
}
template <class T>
RLRR_DEVICE T load_shared(const char* shared) {
  return *reinterpret_cast<const T*>(shared);
}
template <class T>
RLRR_DEVICE void store_shared(char* shared, T value) {
  *reinterpret_cast<T*>(shared) = value;
}

RLRR_DEVICE uint32_t shared_address(const char* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Bypasses L1, since a block reads each tile once.
template <int kBytes>
RLRR_DEVICE void copy_async(char* shared, const void* global) {
  static_assert(kBytes == 16);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Reads `bytes` of the kBytes and fills the rest with zeros.
template <int kBytes>
RLRR_DEVICE void copy_async(char* shared, const void* global, int bytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes),
                 "n"(kBytes)
                 : "memory");
  }
}
RLRR_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of this thread are in flight.
template <int kPending>
RLRR_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

RLRR_DEVICE void ldmatrix(uint32_t (&r)[4], const char* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared)));
}
RLRR_DEVICE void ldmatrix_trans(uint32_t (&r)[4], const char* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared)));
}

// c += a b on a 16 x 8 tile, 16 deep.
template <class T>
RLRR_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
RLRR_DEVICE void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
RLRR_DEVICE void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same, 8 deep, of float32; the tensor cores ignore its last 13 bits.
RLRR_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

RLRR_DEVICE float shuffle_xor(float value, int lanes) { return __shfl_xor_sync(0xffffffffu, value, lanes); }
RLRR_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RLRR_DEVICE uint32_t bits(float value) { return __float_as_uint(value); }
RLRR_DEVICE float from_bits(uint32_t value) { return __uint_as_float(value); }

// Rounds to nearest; the tensor cores alone truncate.
RLRR_DEVICE uint32_t round_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// Packs two 16-bit values, the first in the low half.
template <class T>
RLRR_DEVICE uint32_t narrow2(float low, float high);
template <>
RLRR_DEVICE uint32_t narrow2<bf16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
RLRR_DEVICE uint32_t narrow2<fp16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <class T>
RLRR_DEVICE float2 widen2(uint32_t packed);
template <>
RLRR_DEVICE float2 widen2<bf16>(uint32_t packed) {
  return {from_bits(packed << 16), from_bits(packed & 0xffff0000u)};
}
template <>
RLRR_DEVICE float2 widen2<fp16>(uint32_t packed) {
  float2 wide;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(wide.x), "=f"(wide.y)
      : "r"(packed));
  return wide;
}

// The limit of shared memory is set at each launch: it belongs to the context of a device, and a lookup in a table of
// devices would take as long as the call.
template <auto kKernel, class Parameters>
cudaError_t launch(int64_t blocks, int shared_bytes, cudaStream_t stream, const Parameters& parameters) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kKernel<<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(parameters);
  return cudaGetLastError();
}

}  // namespace rlrr::ptx
