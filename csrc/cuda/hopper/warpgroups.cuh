// How a block of the Hopper kernels is organised: three warpgroups, the ring of stages between them, and boxes.
//
// As in ../machine.cuh, nvcc gets the instructions from sm90.cuh and other compilers from the model in tests/cuda_host.
#pragma once

#include "../machine.cuh"

namespace rlrr::hopper {

// A block is three warpgroups: one fetches (the producer), two multiply (the consumers).
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;

// setmaxnreg moves registers from the producer to the consumers. A launch gives each thread 168, the most that 384
// threads can have of 65536 in multiples of 8.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * 168);

// An mbarrier object: a barrier in shared memory that counts arrivals and bytes.
using Barrier = uint64_t;

}  // namespace rlrr::hopper

#ifdef __CUDACC__
#include "sm90.cuh"
#else
#include <hopper_model.h>
#endif

namespace rlrr::hopper {

// The ring of stages between the warp that fetches and the warps that multiply.
//
// The `full` barrier of a stage completes when its boxes have landed, its `empty` barrier when every warp that reads it
// has arrived. Both sides go round the ring in the same order as long as the block runs, across tiles; a phase is one
// turn.
template <int kStages>
struct Ring {
  Barrier full[kStages];
  Barrier empty[kStages];

  RLRR_DEVICE void init(int readers) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::init(&full[stage], 1);
      ptx::init(&empty[stage], readers);
    }
    ptx::publish_barriers();
  }
};

// The position of one side in the ring.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t phase = 0;

  RLRR_DEVICE void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }

  // For the producer. In the first turn it does not wait: the phase before the first one counts as complete.
  RLRR_DEVICE Barrier* claim(Ring<kStages>& ring, int bytes) const {
    ptx::wait(&ring.empty[stage], phase ^ 1, "empty", stage);
    ptx::arrive_and_expect(&ring.full[stage], bytes);
    return &ring.full[stage];
  }
  // For the readers: each warp arrives once.
  RLRR_DEVICE void await(Ring<kStages>& ring) const { ptx::wait(&ring.full[stage], phase, "full", stage); }
  RLRR_DEVICE void release(Ring<kStages>& ring) const {
    ptx::warp_barrier();
    if (ptx::thread() % 32 == 0) ptx::arrive(&ring.empty[stage]);
  }
};

// A box is what the copy engine fetches at a time: 64 rows of 64 16-bit values.
//
// A row is 128 bytes, the width of the widest swizzle, in which the indices of the 16-byte chunks of row r are xored
// with r % 8. ldmatrix, stmatrix and the tensor cores then read rows and columns without bank conflicts and without
// padding.
constexpr int kBox = 64;
constexpr int kRowBytes = 128;
constexpr int kBoxBytes = kBox * kRowBytes;

// Rows of the accumulators of both consumers. Their columns depend on the pass.
constexpr int kTileRows = kConsumers * kBox;

// The offset of a 16-byte chunk of a row in its box.
RLRR_DEVICE int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row % 8)) << 4); }

// The descriptor of a matrix in shared memory for wgmma (PTX manual, "matrix descriptor"): its start, two strides in
// units of 16 bytes, and the swizzle. 8 rows of 128 bytes follow one another. `next_box`, the distance of the next box,
// matters only if the depth runs down the columns: then the operand continues in the next box after 64 of its rows.
RLRR_DEVICE uint64_t matrix_descriptor(const char* shared, int next_box) {
  constexpr uint64_t kSwizzle128 = 1;
  // the field has 14 bits; addresses in a cluster can have more
  return (ptx::shared_address(shared) >> 4 & 0x3fff) | static_cast<uint64_t>(next_box >> 4) << 16 |
         static_cast<uint64_t>(8 * kRowBytes >> 4) << 32 | kSwizzle128 << 62;
}

// The distance of 16 of depth in the units of a descriptor: along a row, or 16 rows down.
constexpr uint64_t kAlongRow = 16 * 2 >> 4;
constexpr uint64_t kDownRows = 16 * kRowBytes >> 4;

// The position of a thread among the consumers.
struct Lane {
  int index, g, t;  // g: one of 8 rows, t: one of 4 pairs, as in all fragments
  int warp;         // in its warpgroup
  int consumer;     // index of its warpgroup
};
RLRR_DEVICE Lane lane() {
  const int thread = ptx::thread(), index = thread % 32;
  return {index, index / 4, index % 4, thread / 32 % 4, thread / kWarpgroup - 1};
}

}  // namespace rlrr::hopper
