// What sm_90a adds to the machine: one function an instruction, as in ../machine.cuh.
#pragma once

#include "../machine.cuh"

namespace rlrr::hopper {

// A block is three warpgroups: one fetches, two multiply.
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroup;

// setmaxnreg moves registers from the fetching warpgroup to the multiplying ones. A launch gives each
// thread 168, as many as 384 threads can have of 65536 in steps of 8.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = 224;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * 168);

// A barrier of shared memory that counts arrivals and bytes (an mbarrier object).
using Barrier = uint64_t;

}  // namespace rlrr::hopper

#ifdef __CUDACC__
#include "ptx.cuh"
#include "wgmma.cuh"
#else
#include <hopper_model.h>
#endif
