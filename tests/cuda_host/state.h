// The state of the model.
#pragma once

#include "hopper/warpgroups.cuh"

#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace rlrr::model {

constexpr int kMostShared = 227 * 1024;  // of any GPU that is modelled
constexpr int kPoison = 0xff;            // a NaN in float32, float16 and bfloat16
constexpr int kSwizzlePeriod = 1024;

enum class State { runnable, paused, at_instruction, at_barrier, at_phase, done };

// A copy by a thread, of `bytes` out of `size`.
struct Copy {
  char* to;
  const void* from;
  int bytes, size;
  int64_t group;
};

struct Thread {
  State state;
  void* operands;
  std::vector<Copy> copies;
  int64_t groups;  // of copies, committed
  hopper::Barrier* barrier;
  uint32_t parity;
  const char* name;  // of the barrier
  int index;
};

struct IssuedProduct {
  Product lanes[32];
};
struct Warp {
  int arrived = 0;
  void (*run)(void* const*) = nullptr;
  std::deque<IssuedProduct> products;
  size_t issued = 0;
};
// The matrices of its products, on which its four warps must agree.
struct Warpgroup {
  std::vector<std::pair<uint64_t, uint64_t>> matrices;
};

// An mbarrier object.
struct Phase {
  int expected, pending;
  int64_t bytes;
  uint32_t index;
  bool published;
};
struct NamedBarrier {
  int threads;
  std::vector<Thread*> waiting;
};

struct Box {
  char* to;
  const CUtensorMap* map;
  int row, col;
  hopper::Barrier* full;
};

struct Range {
  uintptr_t first, last;
  bool writable;
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::map<const hopper::Barrier*, Phase> phases;
  std::map<int, NamedBarrier> named;
  std::deque<Box> boxes;
  std::vector<Range> ranges;
  int current = 0, block = 0, blocks = 0, shared_bytes = 0;
  void (*kernel)(const void*) = nullptr;
  const void* parameters = nullptr;
  alignas(kSwizzlePeriod) char shared[kMostShared];
  Options options = {};
  std::string failure;
  std::mt19937_64 shuffler;

  void begin_block() {
    std::memset(shared, kPoison, shared_bytes);
    phases.clear(), named.clear(), boxes.clear();
  }
  bool land_a_box();
};

extern Machine machine;

[[noreturn]] void fail(const std::string& what);
void pause();
Phase& phase_of(hopper::Barrier* barrier);
bool is_complete(hopper::Barrier* barrier, uint32_t parity);

}  // namespace rlrr::model
