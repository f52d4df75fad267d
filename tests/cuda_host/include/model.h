// A GPU as strict as the PTX manual lets it be: a block's threads are fibres of one CPU thread.
//
// - A warp runs alone until each of its lanes waits at a block barrier, and the next follows in an
//   order that the caller picks: without a barrier where one is needed, some order reads stale data.
// - An asynchronous copy lands only when its thread waits for it. Until then its destination is
//   poisoned, for those who read too early and for those who had not finished reading.
// - Shared memory starts out as NaN. Any access outside it, or outside the tensors that the caller
//   named, or misaligned, or a write to an input, ends the launch with a message.
// - Warp-wide instructions wait for all 32 lanes; a barrier or such an instruction that only some
//   reach is an error.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace rlrr::model {

enum class Order : int { forwards, backwards, shuffled };

struct Options {
  Order blocks, warps;
  uint64_t seed;
};

// For the caller of the kernels.
void set_options(const Options& options);
void clear_ranges();
void allow(const void* from, int64_t bytes, bool writable);
const std::string& message();
cudaError_t run_grid(int64_t blocks, int threads, int shared_bytes, void (*kernel)(const void*),
                     const void* parameters);

// For the instructions.
int thread();
int block();
char* shared_memory();
void barrier();
void check_global(const void* address, int64_t bytes, int64_t alignment, bool write);
void check_shared(const char* address, int64_t bytes, int64_t alignment);
void copy_async(char* shared, const void* global, int bytes, int size);
void commit_copies();
void wait_copies(int pending);

// Waits until all lanes of the warp have called it with the same `run`, which then sees them all.
void meet(void (*run)(void* const*), void* operands);

template <class Instruction>
void together(Instruction instruction) {
  meet([](void* const* lanes) { Instruction::run(reinterpret_cast<Instruction* const*>(lanes)); }, &instruction);
}

}  // namespace rlrr::model
