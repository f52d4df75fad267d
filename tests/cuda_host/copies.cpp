// Asynchronous copies: by threads (PTX manual: cp.async), and by the copy engine, with the barriers that count its
// bytes (mbarrier, cp.async.bulk.tensor, tensor swizzling modes).
#include <algorithm>

#include "state.h"

namespace rlrr::model {
int64_t maps_encoded = 0;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const int element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  const auto in_range = [](cuuint64_t size) { return size >= 1 && size <= cuuint64_t{1} << 32; };
  // the limits in the manual of the driver API
  const bool valid = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 &&
                     strides[0] < cuuint64_t{1} << 40 && strides[0] >= sizes[0] * element && in_range(sizes[0]) &&
                     in_range(sizes[1]) && box[0] >= 1 && box[0] <= 256 && box[1] >= 1 && box[1] <= 256 &&
                     box[0] * element % 16 == 0 && (!swizzled || box[0] * element <= 128) && element_strides[0] == 1 &&
                     element_strides[1] == 1;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  ++rlrr::model::maps_encoded;
  *map = {static_cast<const char*>(data),
          static_cast<int64_t>(sizes[1]),
          static_cast<int64_t>(sizes[0]),
          static_cast<int64_t>(strides[0]),
          static_cast<int>(box[1]),
          static_cast<int>(box[0]),
          element,
          type,
          swizzled};
  return CUDA_SUCCESS;
}

namespace rlrr::model {
namespace {

void complete_if_due(Phase& phase) {
  if (phase.pending || phase.bytes) return;
  phase.pending = phase.expected;
  ++phase.index;
}

// The offset of a byte of a box: bits 4 to 6 are xored with bits 7 to 9.
int64_t swizzle(int64_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

void land(const Copy& copy) {
  std::memset(copy.to, 0, copy.size);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace

void copy_async(char* shared, const void* global, int bytes, int size) {
  if (reinterpret_cast<uintptr_t>(global) % size) fail("misaligned global address of a copy");
  if (bytes < 0 || bytes > size) fail("a copy of " + std::to_string(bytes) + " bytes");
  check_shared(shared, size, size);
  if (bytes) check_global(global, bytes, 1, false);
  std::memset(shared, kPoison, size);
  Thread& thread = machine.threads[machine.current];
  thread.copies.push_back({shared, global, bytes, size, thread.groups});
}

void commit_copies() { ++machine.threads[machine.current].groups; }

void wait_copies(int pending) {
  Thread& thread = machine.threads[machine.current];
  const int64_t landed = thread.groups - pending;  // groups before this one
  const auto later =
      std::find_if(thread.copies.begin(), thread.copies.end(), [&](const Copy& copy) { return copy.group >= landed; });
  std::for_each(thread.copies.begin(), later, land);
  thread.copies.erase(thread.copies.begin(), later);
}

uint32_t shared_address(const char* shared) { return static_cast<uint32_t>(shared - machine.shared); }

Phase& phase_of(hopper::Barrier* barrier) {
  const auto found = machine.phases.find(barrier);
  if (found == machine.phases.end()) fail("a barrier that was never set up");
  return found->second;
}
bool is_complete(hopper::Barrier* barrier, uint32_t parity) { return (phase_of(barrier).index & 1) != parity; }

void init(hopper::Barrier* barrier, int arrivals) {
  check_shared(reinterpret_cast<char*>(barrier), 8, 8);
  machine.phases[barrier] = {arrivals, arrivals, 0, 0, false};
}
void publish_barriers() {
  for (auto& entry : machine.phases) entry.second.published = true;
}
void arrive(hopper::Barrier* barrier, int bytes) {
  Phase& phase = phase_of(barrier);
  phase.bytes += bytes;
  if (--phase.pending < 0) fail("more arrivals than a phase expects");
  complete_if_due(phase);
  pause();
}

void copy_box(char* shared, const CUtensorMap& map, int row, int col, hopper::Barrier* full) {
  const int bytes = map.box_rows * map.box_cols * map.element_bytes;
  check_shared(shared, bytes, map.swizzled ? kSwizzlePeriod : 128);
  if (!phase_of(full).published) fail("a barrier that the copy engine has not been shown");
  std::memset(shared, kPoison, bytes);
  machine.boxes.push_back({shared, &map, row, col, full});
}

bool Machine::land_a_box() {
  if (boxes.empty()) return false;
  size_t which = options.warps == Order::forwards ? 0 : boxes.size() - 1;
  if (options.warps == Order::shuffled) which = shuffler() % boxes.size();
  const Box box = boxes[which];
  boxes.erase(boxes.begin() + which);
  const CUtensorMap& map = *box.map;
  const int row_bytes = map.box_cols * map.element_bytes;
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < map.box_cols; ++c) {
      const int64_t row = int64_t{box.row} + r, col = int64_t{box.col} + c;
      const int64_t offset = box.to - shared + r * row_bytes + c * map.element_bytes;
      char* to = shared + (map.swizzled ? swizzle(offset) : offset);
      const bool inside = row >= 0 && row < map.rows && col >= 0 && col < map.cols;
      if (inside) {
        std::memcpy(to, map.data + row * map.row_bytes + col * map.element_bytes, map.element_bytes);
      } else {
        std::memset(to, 0, map.element_bytes);
      }
    }
  Phase& phase = phase_of(box.full);
  phase.bytes -= map.box_rows * row_bytes;
  complete_if_due(phase);
  return true;
}

}  // namespace rlrr::model
