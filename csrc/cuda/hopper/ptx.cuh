// Barriers, bulk tensor copies and register transfers, under the names that machine.cuh promises.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#ifdef RLRR_DEBUG_WAITS
#include <cstdio>
#endif

#define RLRR_HOPPER_KERNEL __global__ void __launch_bounds__(::rlrr::hopper::kBlockThreads, 1)

namespace rlrr::ptx {

using hopper::Barrier;

RLRR_DEVICE int blocks() { return gridDim.x; }

// 1024 bytes are the period of the 128-byte swizzle: a box that starts elsewhere would be permuted
// differently by the copy engine, the tensor cores and the kernels' own loads.
RLRR_DEVICE char* swizzled_shared_memory() {
  extern __shared__ __align__(1024) char swizzled_memory[];
  return swizzled_memory;
}

RLRR_DEVICE uint32_t address(const Barrier* barrier) { return shared_address(reinterpret_cast<const char*>(barrier)); }

RLRR_DEVICE void init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals) : "memory");
}
// The copy engine sees barriers through another proxy than the threads that set them up.
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
// Until the phase of this parity is complete. A new barrier is in phase 0; the one before it counts
// as complete. `name[index]` is the barrier's, for RLRR_DEBUG_WAITS.
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
// Whoever waits has its first lane wait too. All who hang say so before the first of them ends the kernel.
RLRR_DEVICE void wait(Barrier* barrier, uint32_t parity, const char* name, int index) {
  constexpr int64_t kLongest = int64_t{1} << 33;  // cycles, four seconds or more
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

// Of `threads` threads of the block; 0 is __syncthreads' own.
RLRR_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

RLRR_DEVICE void warp_barrier() { __syncwarp(); }

RLRR_DEVICE void prefetch(const CUtensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
// The box at (row, col), zeros outside the matrix; all its bytes count towards the barrier either way.
RLRR_DEVICE void copy_box(char* shared, const CUtensorMap& map, int row, int col, Barrier* full) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(address(full)), "r"(col), "r"(row)
      : "memory");
}

// By every warp of a warpgroup.
template <int kRegisters>
RLRR_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
RLRR_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8 x 8 tiles of 16-bit values, transposed on the way.
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

}  // namespace rlrr::ptx
