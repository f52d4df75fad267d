// How the model runs threads, and what it checks: see include/model.h.
#include <algorithm>
#include <numeric>

#include "fibre.h"
#include "state.h"

namespace rlrr::model {

Machine machine;

namespace {

std::vector<Fibre> fibres;
Fibre scheduler;

void leave() { Fibre::swap(fibres[machine.current], scheduler); }

void body() {
  machine.kernel(machine.parameters);
  machine.threads[machine.current].state = State::done;
  for (;;) leave();
}

std::vector<int> permutation(int count, Order order) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::backwards) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), machine.shuffler);
  return indices;
}

bool can_go_on(Thread& thread) {
  if (thread.state == State::at_phase && is_complete(thread.barrier, thread.parity)) thread.state = State::runnable;
  return thread.state == State::runnable;
}

// Runs a warp until no lane can continue. Returns whether any could.
bool run_warp(int warp) {
  bool any = false;
  const std::vector<int> lanes = permutation(32, machine.options.warps);
  for (bool ran = true; ran;) {
    ran = false;
    for (int lane : lanes) {
      Thread& thread = machine.threads[32 * warp + lane];
      if (!can_go_on(thread)) continue;
      machine.current = 32 * warp + lane;
      ran = any = true;
      Fibre::swap(scheduler, fibres[machine.current]);
      if (!machine.failure.empty()) return false;
    }
  }
  return any;
}

// The mbarriers for which warps wait. The first lane of each warp waits whenever any lane does.
std::string waits() {
  std::string all;
  for (size_t i = 0; i < machine.threads.size(); i += 32) {
    const Thread& thread = machine.threads[i];
    if (thread.state != State::at_phase) continue;
    all += "; warp " + std::to_string(i / 32) + " waits for phase " + std::to_string(thread.parity) + " of " +
           thread.name + "[" + std::to_string(thread.index) + "]";
  }
  return all;
}

bool run_block(int threads) {
  machine.begin_block();
  machine.threads.resize(threads);
  machine.warps.assign(threads / 32, {});
  machine.warpgroups.assign((threads + 127) / 128, {});
  fibres.resize(threads);
  for (int i = 0; i < threads; ++i) {
    fibres[i].start(body);
    machine.threads[i].state = State::runnable;
    machine.threads[i].copies.clear();
    machine.threads[i].groups = 0;
  }
  const auto done = [](const Thread& thread) { return thread.state == State::done; };
  for (;;) {
    bool any = false;
    for (Thread& thread : machine.threads)
      if (thread.state == State::paused) thread.state = State::runnable;
    for (int warp : permutation(threads / 32, machine.options.warps)) {
      any |= run_warp(warp);
      if (!machine.failure.empty()) return false;
    }
    if (any) continue;  // a thread that paused ran before it did
    if (std::all_of(machine.threads.begin(), machine.threads.end(), done)) break;
    if (!machine.land_a_box()) {
      machine.failure =
          "block " + std::to_string(machine.block) + ": nobody can go on, and no box is under way" + waits();
      return false;
    }
  }
  if (!machine.boxes.empty()) machine.failure = "the block ends with boxes under way";
  for (const Warp& warp : machine.warps)
    if (!warp.products.empty()) machine.failure = "the block ends with products under way";
  return machine.failure.empty();
}

}  // namespace

void fail(const std::string& what) {
  machine.failure =
      "block " + std::to_string(machine.block) + ", thread " + std::to_string(machine.current) + ": " + what;
  for (;;) leave();  // the scheduler abandons the launch
}

void set_options(const Options& chosen) {
  machine.options = chosen;
  machine.shuffler.seed(chosen.seed);
}
void clear_ranges() { machine.ranges.clear(); }
void allow(const void* from, int64_t bytes, bool writable) {
  const auto first = reinterpret_cast<uintptr_t>(from);
  machine.ranges.push_back({first, first + static_cast<uintptr_t>(bytes), writable});
}
const std::string& message() { return machine.failure; }

cudaError_t run_grid(int64_t blocks, int threads, int shared_bytes, int most_shared_bytes, void (*kernel)(const void*),
                     const void* parameters) {
  machine.failure.clear();
  if (blocks < 1 || blocks > 0x7fffffff || shared_bytes > most_shared_bytes) {
    machine.failure = "a grid of " + std::to_string(blocks) + ", " + std::to_string(shared_bytes) + " bytes shared";
    return cudaErrorInvalidValue;
  }
  machine.kernel = kernel;
  machine.parameters = parameters;
  machine.blocks = static_cast<int>(blocks);
  machine.shared_bytes = shared_bytes;
  for (int64_t i = 0; i < blocks; ++i) {
    machine.block = static_cast<int>(machine.options.blocks == Order::forwards ? i : blocks - 1 - i);
    if (!run_block(threads)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

int thread() { return machine.current; }
int block() { return machine.block; }
int blocks() { return machine.blocks; }
char* shared_memory() { return machine.shared; }

void barrier() { named_barrier(0, static_cast<int>(machine.threads.size())); }

void named_barrier(int id, int threads) {
  NamedBarrier& named = machine.named[id];
  if (named.waiting.empty()) named.threads = threads;
  if (named.threads != threads) fail("threads disagree on how many a barrier is of");
  Thread& thread = machine.threads[machine.current];
  named.waiting.push_back(&thread);
  thread.state = State::at_barrier;
  if (static_cast<int>(named.waiting.size()) == threads) {
    for (Thread* each : named.waiting) each->state = State::runnable;
    named.waiting.clear();
  }
  if (thread.state != State::runnable) leave();
}

void pause() {
  const Order order = machine.options.warps;
  if (order == Order::forwards || (order == Order::shuffled && machine.shuffler() % 2)) return;
  machine.threads[machine.current].state = State::paused;
  leave();
}

void wait(hopper::Barrier* barrier, uint32_t parity, const char* name, int index) {
  Thread& thread = machine.threads[machine.current];
  phase_of(barrier);  // must exist
  if (is_complete(barrier, parity)) return;
  thread.barrier = barrier;
  thread.parity = parity;
  thread.name = name;
  thread.index = index;
  thread.state = State::at_phase;
  leave();
}

void meet(void (*run)(void* const*), void* operands) {
  Warp& warp = machine.warps[machine.current / 32];
  Thread* const lanes = machine.threads.data() + machine.current / 32 * 32;
  if (warp.arrived && warp.run != run) fail("lanes of a warp meet at different instructions");
  machine.threads[machine.current].operands = operands;
  warp.run = run;
  if (++warp.arrived < 32) {
    machine.threads[machine.current].state = State::at_instruction;
    return leave();
  }
  void* all[32];
  for (int i = 0; i < 32; ++i) all[i] = lanes[i].operands;
  run(all);
  warp.arrived = 0;
  for (int i = 0; i < 32; ++i) lanes[i].state = State::runnable;
}

void check_global(const void* address, int64_t bytes, int64_t alignment, bool write) {
  const auto first = reinterpret_cast<uintptr_t>(address);
  if (first % alignment) fail("misaligned global address");
  for (const Range& range : machine.ranges)
    if (first >= range.first && first + bytes <= range.last && (range.writable || !write)) return;
  fail(write ? "a write outside the results" : "a read outside the tensors");
}

void check_shared(const char* address, int64_t bytes, int64_t alignment) {
  const int64_t offset = address - machine.shared;
  if (offset < 0 || offset + bytes > machine.shared_bytes) fail("shared memory offset " + std::to_string(offset));
  if (offset % alignment) fail("misaligned shared address " + std::to_string(offset));
}

}  // namespace rlrr::model
