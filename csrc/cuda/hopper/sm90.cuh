// The instructions that sm_90a adds: barriers in shared memory, bulk tensor copies, register transfers and wgmma.
// Included by warpgroups.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#ifdef RLRR_DEBUG_WAITS
#include <cstdio>
#endif

#define RLRR_HOPPER_KERNEL __global__ void __launch_bounds__(::rlrr::hopper::kBlockThreads, 1)

namespace rlrr::ptx {

using hopper::Barrier;

RLRR_DEVICE int blocks() { return gridDim.x; }

// Aligned to 1024 bytes, the period of the 128-byte swizzle: from any other start the copy engine, the tensor cores and
// the loads of the kernels would disagree on the permutation.
RLRR_DEVICE char* swizzled_shared_memory() {
  extern __shared__ __align__(1024) char swizzled_memory[];
  return swizzled_memory;
}

RLRR_DEVICE uint32_t address(const Barrier* barrier) { return shared_address(reinterpret_cast<const char*>(barrier)); }

RLRR_DEVICE void init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}
// Makes barriers visible to the copy engine, which accesses memory through another proxy than the threads do.
RLRR_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
RLRR_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}
RLRR_DEVICE void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity is complete. A new barrier is in phase 0; the phase before it counts as
// complete. `name[index]` names the barrier in the output of RLRR_DEBUG_WAITS.
#ifdef RLRR_DEBUG_WAITS
RLRR_DEVICE bool is_complete(Barrier* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(address(barrier)), "r"(parity)
      : "memory");
  return done;
}
// The first lane of each waiting warp reports it. All that hang have done so before the first of them ends the kernel.
RLRR_DEVICE void wait(Barrier* barrier, uint32_t parity, const char* name, int index) {
  constexpr int64_t kLongest = int64_t{1} << 33;  // cycles: at least four seconds
  bool said = false;
  for (const int64_t start = clock64(); !is_complete(barrier, parity);) {
    const int64_t waited = clock64() - start;
    if (thread() % 32 || waited < kLongest) continue;
    if (!said)
      printf("block %d, warp %d waits for ever: phase %u of %s[%d]\n", block(), thread() / 32, parity, name, index);
    said = true;
    if (waited > 2 * kLongest) __trap();
  }
}
#else
RLRR_DEVICE void wait(Barrier* barrier, uint32_t parity, const char*, int) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}
#endif

// A barrier of `threads` threads of the block. __syncthreads uses barrier 0.
RLRR_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

RLRR_DEVICE void warp_barrier() { __syncwarp(); }

RLRR_DEVICE void prefetch(const CUtensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// Copies the box at (row, col), with zeros outside the matrix. The barrier counts all bytes of the box in any case.
RLRR_DEVICE void copy_box(char* shared, const CUtensorMap& map, int row, int col, Barrier* full) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(address(full)), "r"(col), "r"(row)
      : "memory");
}

// To be executed by all warps of a warpgroup.
template <int kRegisters>
RLRR_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
RLRR_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores four 8 x 8 tiles of 16-bit values, transposed.
RLRR_DEVICE void stmatrix_trans(char* shared, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

template <auto kKernel, class Parameters>
cudaError_t launch_warpgroups(int blocks, int shared_bytes, cudaStream_t stream, const Parameters& parameters) {
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kKernel<<<blocks, hopper::kBlockThreads, shared_bytes, stream>>>(parameters);
  return cudaGetLastError();
}

// wgmma: a warpgroup multiplies 64 rows by 256 or 128 columns, 16 deep, asynchronously.
//
// Each product has its own fence and commit in one asm statement: the compiler cannot move the computation of an
// operand past the fence, and `wait_products` counts products.

// The part of 64 x kColumns that a lane holds: of each 8 columns the pair 2t, 2t + 1 in rows g and g + 8 of the 16 rows
// of its warp.
template <int kColumns>
using Products = float[kColumns / 2];

// The sums of 128 and of 256 columns: their names in the instruction, and the operands of the asm statement.
#define RLRR_NAMES_128                                                               \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define RLRR_NAMES_256                                                                           \
  RLRR_NAMES_128                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define RLRR_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RLRR_16(i) RLRR_4(i), RLRR_4(i + 4), RLRR_4(i + 8), RLRR_4(i + 12)
#define RLRR_SUMS_128 RLRR_16(0), RLRR_16(16), RLRR_16(32), RLRR_16(48)
#define RLRR_SUMS_256 RLRR_SUMS_128, RLRR_16(64), RLRR_16(80), RLRR_16(96), RLRR_16(112)

// `operands`: those of the instruction after the sums. The remaining arguments are their values.
#define RLRR_WGMMA(columns, type, names, sums, operands, ...)                                        \
  asm volatile(                                                                                      \
      "wgmma.fence.sync.aligned;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " operands \
      ";\n"                                                                                          \
      "wgmma.commit_group.sync.aligned;"                                                             \
      : sums                                                                                         \
      : __VA_ARGS__                                                                                  \
      : "memory")
#define RLRR_256(type, operands, ...) RLRR_WGMMA("256", type, RLRR_NAMES_256, RLRR_SUMS_256, operands, __VA_ARGS__)
#define RLRR_128(type, operands, ...) RLRR_WGMMA("128", type, RLRR_NAMES_128, RLRR_SUMS_128, operands, __VA_ARGS__)

// d += a b, with the 64 rows of a in registers and the columns of b in shared memory, where the depth runs along the
// rows. `a` must not change until the product has been waited for.
#define RLRR_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
template <class T>
RLRR_DEVICE void multiply(Products<256>& d, const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_256("bf16", "{%128, %129, %130, %131}, %132, 1, 1, 1, 0", RLRR_OPERANDS);
  } else {
    RLRR_256("f16", "{%128, %129, %130, %131}, %132, 1, 1, 1, 0", RLRR_OPERANDS);
  }
}
template <class T>
RLRR_DEVICE void multiply(Products<128>& d, const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_128("bf16", "{%64, %65, %66, %67}, %68, 1, 1, 1, 0", RLRR_OPERANDS);
  } else {
    RLRR_128("f16", "{%64, %65, %66, %67}, %68, 1, 1, 1, 0", RLRR_OPERANDS);
  }
}

// The same with both operands in shared memory, where the depth runs down the columns.
template <class T>
RLRR_DEVICE void multiply_transposed(Products<256>& d, uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, bf16>) {
    RLRR_256("bf16", "%128, %129, 1, 1, 1, 1, 1", "l"(a), "l"(b));
  } else {
    RLRR_256("f16", "%128, %129, 1, 1, 1, 1, 1", "l"(a), "l"(b));
  }
}

// Waits until at most kPending products of this warp are in flight.
template <int kPending>
RLRR_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Waits for all products. The sums are operands here, so that the compiler does not read them earlier.
RLRR_DEVICE void finish(Products<256>& d) {
  wait_products<0>();
  asm volatile("" : RLRR_SUMS_256::"memory");
}
RLRR_DEVICE void finish(Products<128>& d) {
  wait_products<0>();
  asm volatile("" : RLRR_SUMS_128::"memory");
}

#undef RLRR_OPERANDS
#undef RLRR_128
#undef RLRR_256
#undef RLRR_WGMMA
#undef RLRR_SUMS_256
#undef RLRR_SUMS_128
#undef RLRR_16
#undef RLRR_4
#undef RLRR_NAMES_256
#undef RLRR_NAMES_128

}  // namespace rlrr::ptx
