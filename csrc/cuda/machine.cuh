// Everything a kernel asks of the machine goes through `rlrr::ptx`, one function an instruction.
//
// The kernels are then plain C++: built without nvcc, they run on a CPU against a model of these
// instructions that is stricter than a GPU (tests/cuda_host), from the very same source.
#pragma once

#include <cstdint>

namespace rlrr {

constexpr int kThreads = 128;  // of every block
constexpr int kWarps = kThreads / 32;

// Raw bits, not CUDA's classes: those have no meaning to a host compiler.
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
