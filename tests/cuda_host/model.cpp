// Threads, barriers, memory and copies of the machine that model.h describes.
#include "machine.cuh"

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "fibre.h"

namespace rlrr::model {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostShared = 99 * 1024;  // what every GPU from sm_80 on grants a block
constexpr int kPoison = 0xff;           // a NaN in float32, float16 and bfloat16

enum class State { runnable, at_instruction, at_barrier, done };

struct Copy {
  char* to;
  const void* from;
  int bytes, size;
  int64_t group;
};

struct Thread {
  Fibre fibre;
  State state;
  std::vector<Copy> copies;
  int64_t groups;
  void* operands;
};

struct Warp {
  int arrived;
  void (*run)(void* const*);
};

struct Range {
  uintptr_t first, last;
  bool writable;
};

// One launch at a time; a test process has one CPU thread in here.
Thread threads[kMostThreads];
Warp warps[kMostThreads / 32];
Fibre scheduler;
int thread_count, current;
int64_t current_block;
void (*current_kernel)(const void*);
const void* current_parameters;
std::vector<char> memory;
char* shared_base;
int64_t shared_size;
std::vector<Range> ranges;
Options options;
std::string failure;
std::mt19937_64 shuffler;

void leave() { Fibre::swap(threads[current].fibre, scheduler); }

[[noreturn]] void fail(const std::string& what) {
  failure = "block " + std::to_string(current_block) + ", thread " + std::to_string(current) + ": " + what;
  for (;;) leave();  // the scheduler abandons the launch
}

void body() {
  current_kernel(current_parameters);
  threads[current].state = State::done;
  for (;;) leave();
}

std::vector<int> permutation(int count, Order order) {
  std::vector<int> indices(count);
  std::iota(indices.begin(), indices.end(), 0);
  if (order == Order::backwards) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), shuffler);
  return indices;
}

// Until each lane waits at a barrier or is done; false on failure.
bool run_warp(int warp) {
  const std::vector<int> lanes = permutation(32, options.warps);
  for (bool ran = true; ran;) {
    ran = false;
    for (int lane : lanes) {
      current = 32 * warp + lane;
      if (threads[current].state != State::runnable) continue;
      ran = true;
      Fibre::swap(scheduler, threads[current].fibre);
      if (!failure.empty()) return false;
    }
  }
  if (warps[warp].arrived) {
    failure = "a warp-wide instruction that only " + std::to_string(warps[warp].arrived) + " lanes reach";
    return false;
  }
  return true;
}

bool run_block() {
  std::fill(shared_base, shared_base + shared_size, static_cast<char>(kPoison));
  for (int i = 0; i < thread_count; ++i) {
    threads[i].fibre.start(body);
    threads[i].state = State::runnable;
    threads[i].copies.clear();
    threads[i].groups = 0;
  }
  for (int i = 0; i < thread_count / 32; ++i) warps[i].arrived = 0;
  for (;;) {
    for (int warp : permutation(thread_count / 32, options.warps))
      if (!run_warp(warp)) return false;
    const int done = std::count_if(threads, threads + thread_count, [](auto& t) { return t.state == State::done; });
    if (done == thread_count) return true;
    if (done) {
      failure = "a barrier that " + std::to_string(done) + " threads do not reach";
      return false;
    }
    for (int i = 0; i < thread_count; ++i) threads[i].state = State::runnable;
  }
}

void land(const Copy& copy) {
  std::memset(copy.to, 0, copy.size);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace

void set_options(const Options& chosen) {
  options = chosen;
  shuffler.seed(chosen.seed);
}
void clear_ranges() { ranges.clear(); }
void allow(const void* from, int64_t bytes, bool writable) {
  const auto first = reinterpret_cast<uintptr_t>(from);
  ranges.push_back({first, first + static_cast<uintptr_t>(bytes), writable});
}
const std::string& message() { return failure; }

cudaError_t run_grid(int64_t blocks, int count, int shared_bytes, void (*kernel)(const void*), const void* parameters) {
  failure.clear();
  if (blocks < 1 || blocks > 0x7fffffff || shared_bytes > kMostShared) {
    failure = "a grid of " + std::to_string(blocks) + " blocks, " + std::to_string(shared_bytes) + " bytes shared";
    return cudaErrorInvalidValue;
  }
  thread_count = count;
  current_kernel = kernel;
  current_parameters = parameters;
  memory.resize(kMostShared + 128);
  shared_base = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128);
  // the static shared memory that a kernel could have is not modelled: the kernels have none
  shared_size = shared_bytes;
  for (int64_t i = 0; i < blocks; ++i) {
    current_block = options.blocks == Order::forwards ? i : blocks - 1 - i;
    if (!run_block()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

int thread() { return current; }
int block() { return static_cast<int>(current_block); }
char* shared_memory() { return shared_base; }

void barrier() {
  threads[current].state = State::at_barrier;
  leave();
}

void meet(void (*run)(void* const*), void* operands) {
  Warp& warp = warps[current / 32];
  Thread* const lanes = threads + current / 32 * 32;
  if (warp.arrived && warp.run != run) fail("lanes of a warp meet at different instructions");
  threads[current].operands = operands;
  warp.run = run;
  if (++warp.arrived < 32) {
    threads[current].state = State::at_instruction;
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
  for (const Range& range : ranges)
    if (first >= range.first && first + bytes <= range.last && (range.writable || !write)) return;
  fail(write ? "a write outside the results" : "a read outside the tensors");
}

void check_shared(const char* address, int64_t bytes, int64_t alignment) {
  const int64_t offset = address - shared_base;
  if (offset < 0 || offset + bytes > shared_size) fail("shared memory offset " + std::to_string(offset));
  if (offset % alignment) fail("misaligned shared address " + std::to_string(offset));
}

void copy_async(char* shared, const void* global, int bytes, int size) {
  if (reinterpret_cast<uintptr_t>(global) % size) fail("misaligned global address of a copy");
  if (bytes < 0 || bytes > size) fail("a copy of " + std::to_string(bytes) + " bytes");
  check_shared(shared, size, size);
  if (bytes) check_global(global, bytes, 1, false);
  std::memset(shared, kPoison, size);
  threads[current].copies.push_back({shared, global, bytes, size, threads[current].groups});
}

void commit_copies() { ++threads[current].groups; }

void wait_copies(int pending) {
  Thread& thread = threads[current];
  const int64_t landed = thread.groups - pending;  // groups before this one
  const auto later =
      std::find_if(thread.copies.begin(), thread.copies.end(), [&](const Copy& copy) { return copy.group >= landed; });
  std::for_each(thread.copies.begin(), later, land);
  thread.copies.erase(thread.copies.begin(), later);
}

}  // namespace rlrr::model
