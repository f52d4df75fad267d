// A model of a GPU that is as strict as the PTX manual allows. The threads of a block are fibres of one CPU thread.
//
// - A warp runs alone until none of its lanes can continue; the caller chooses the order of warps. If a barrier is
// missing,
//   some order reads stale data. In backward order a warp also pauses after it has arrived at an mbarrier, so that others
//   continue first; in shuffled order it sometimes does.
// - Whatever is asynchronous happens as late as possible. A copy of a thread lands when the thread waits for it, a box
// of
//   the copy engine when no thread can continue without it; until then the destination is poisoned. A product of wgmma is
//   computed when its warp waits for it, from what registers and shared memory contain then.
// - Shared memory starts out as NaN. An access outside it or outside the tensors that the caller named, a misaligned
// one,
//   or a write to an input ends the launch with a message.
// - Warp-wide instructions wait for all 32 lanes. If only some threads reach one, or a barrier, the launch ends.
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

// For entry.cpp.
void set_options(const Options& options);
void clear_ranges();
void allow(const void* from, int64_t bytes, bool writable);
const std::string& message();
cudaError_t run_grid(int64_t blocks, int threads, int shared_bytes, int most_shared_bytes, void (*kernel)(const void*),
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

// Waits until all lanes of the warp have called it with the same `run`, which is then called with the operands of all.
void meet(void (*run)(void* const*), void* operands);

template <class Instruction>
void together(Instruction instruction) {
  meet([](void* const* lanes) { Instruction::run(reinterpret_cast<Instruction* const*>(lanes)); }, &instruction);
}

}  // namespace rlrr::model
