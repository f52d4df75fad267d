// The functions of csrc/cuda/hopper/sm90.cuh on the model of a GPU. Included by csrc/cuda/hopper/warpgroups.cuh.
#pragma once

#include <cuda.h>

#include <type_traits>

#define RLRR_HOPPER_KERNEL inline void

namespace rlrr::model {

int blocks();
uint32_t shared_address(const char* shared);
void init(hopper::Barrier* barrier, int arrivals);
void publish_barriers();
void arrive(hopper::Barrier* barrier, int bytes);
void wait(hopper::Barrier* barrier, uint32_t parity, const char* name, int index);
void named_barrier(int id, int threads);
void copy_box(char* shared, const CUtensorMap& map, int row, int col, hopper::Barrier* full);

// A product that a lane takes part in. It is computed when it is waited for.
struct Product {
  float* sums;
  const uint32_t* a;  // registers, or null
  uint64_t a_matrix, b_matrix;
  bool transposed, is_bf16;
  int columns;

  static void run(Product* const* lanes);
};
struct Wait {
  int pending;

  static void run(Wait* const* lanes);
};
struct WarpBarrier {
  static void run(WarpBarrier* const*) {}
};
struct Stmatrix {
  char* address;
  const uint32_t* r;

  static void run(Stmatrix* const* lanes);
};

}  // namespace rlrr::model

namespace rlrr::ptx {

using hopper::Barrier;

inline int blocks() { return model::blocks(); }
inline char* swizzled_shared_memory() { return model::shared_memory(); }
inline uint32_t shared_address(const char* shared) { return model::shared_address(shared); }

inline void init(Barrier* barrier, int arrivals) { model::init(barrier, arrivals); }
inline void publish_barriers() { model::publish_barriers(); }
inline void arrive(Barrier* barrier) { model::arrive(barrier, 0); }
inline void arrive_and_expect(Barrier* barrier, int bytes) { model::arrive(barrier, bytes); }
inline void wait(Barrier* barrier, uint32_t parity, const char* name, int index) {
  model::wait(barrier, parity, name, index);
}
inline void named_barrier(int id, int threads) { model::named_barrier(id, threads); }
inline void warp_barrier() { model::together(model::WarpBarrier{}); }

inline void prefetch(const CUtensorMap&) {}
inline void copy_box(char* shared, const CUtensorMap& map, int row, int col, Barrier* full) {
  model::copy_box(shared, map, row, col, full);
}

template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  model::together(model::WarpBarrier{});
}
template <int kRegisters>
void take_registers() {
  give_registers<kRegisters>();
}

inline void stmatrix_trans(char* shared, const uint32_t (&r)[4]) { model::together(model::Stmatrix{shared, r}); }

template <int kColumns>
using Products = float[kColumns / 2];

template <class T, int kSums>
void multiply(float (&d)[kSums], const uint32_t (&a)[4], uint64_t b) {
  static_assert(kSums % 4 == 0 && kSums <= 128);
  model::together(model::Product{d, a, 0, b, false, std::is_same_v<T, bf16>, 2 * kSums});
}
template <class T, int kSums>
void multiply_transposed(float (&d)[kSums], uint64_t a, uint64_t b) {
  static_assert(kSums % 4 == 0 && kSums <= 128);
  model::together(model::Product{d, nullptr, a, b, true, std::is_same_v<T, bf16>, 2 * kSums});
}
template <int kPending>
void wait_products() {
  model::together(model::Wait{kPending});
}
template <int kSums>
void finish(float (&)[kSums]) {
  wait_products<0>();
}

template <auto kKernel, class Parameters>
cudaError_t launch_warpgroups(int blocks, int shared_bytes, cudaStream_t, const Parameters& parameters) {
  return model::run_grid(
      blocks, hopper::kBlockThreads, shared_bytes, 227 * 1024,
      [](const void* p) { kKernel(*static_cast<const Parameters*>(p)); }, &parameters);
}

}  // namespace rlrr::ptx
