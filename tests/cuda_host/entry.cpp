// What the tests call through ctypes: the entry points of csrc/cuda or, with RLRR_HOPPER, of csrc/cuda/hopper. Each
// pass first tells the model what it may access.
#include "hopper/warpgroups.cuh"

#include <cstring>

#include "passes.h"
#if defined(RLRR_HOPPER)
#include "hopper/persistent_product.cuh"
#include "hopper/tensor_map.h"
#endif

// Weak, since a test of one pass builds that pass alone.
namespace rlrr {
[[gnu::weak]] cudaError_t forward(const Forward&, cudaStream_t);
[[gnu::weak]] cudaError_t grad_input(const GradInput&, cudaStream_t);
[[gnu::weak]] cudaError_t grad_scales(const GradScales&, cudaStream_t);
[[gnu::weak]] int64_t workspace_floats(const Forward&);
[[gnu::weak]] int64_t workspace_floats(const GradInput&);
[[gnu::weak]] int64_t workspace_floats(const GradScales&);

namespace hopper {
[[gnu::weak]] bool supports(const Forward&);
[[gnu::weak]] bool supports(const GradInput&);
[[gnu::weak]] bool supports(const GradScales&);
[[gnu::weak]] cudaError_t forward(const Forward&, cudaStream_t);
[[gnu::weak]] cudaError_t grad_input(const GradInput&, cudaStream_t);
[[gnu::weak]] cudaError_t grad_scales(const GradScales&, cudaStream_t);
[[gnu::weak]] int64_t workspace_floats(const GradScales&);
}  // namespace hopper

namespace model {
extern int64_t maps_encoded;
}

namespace {

#if defined(RLRR_HOPPER)
namespace passes = hopper;
int64_t floats(const GradScales& g) { return hopper::workspace_floats(g); }
template <class Product>
int64_t floats(const Product&) {
  return 0;
}

// The producer of the second block claims stages whose boxes never land and which no reader releases.
RLRR_HOPPER_KERNEL hanging_kernel(RLRR_PARAMETER int) {
  auto& ring = *reinterpret_cast<hopper::Ring<2>*>(ptx::swizzled_shared_memory());
  if (ptx::block() == 0) return;
  if (ptx::thread() == 0) ring.init(1);
  ptx::barrier();
  hopper::Place<2> place;
  if (ptx::thread() == 0) {
    for (int step = 0; step < 4; ++step, place.next()) place.claim(ring, 1024);
  } else if (ptx::thread() / 32 == 5) {
    place.next();
    place.await(ring);
  }
}
#else
namespace passes = rlrr;
template <class Problem>
int64_t floats(const Problem& problem) {
  return workspace_floats(problem);
}
#endif

void allow(const Matrix& matrix, int64_t rows, int64_t cols, bool writable) {
  const int64_t last = (rows - 1) * matrix.row_stride + (cols - 1) * matrix.col_stride;
  model::allow(matrix.data, (last + 1) * (matrix.dtype == Dtype::float32 ? 4 : 2), writable);
}
void allow(const float* vector, int64_t count, bool writable) {
  if (vector) model::allow(vector, 4 * count, writable);
}
void allow(const Vector& vector, int64_t count) {
  if (vector.data) model::allow(vector.data, count * (vector.dtype == Dtype::float32 ? 4 : 2), false);
}

void begin(const Layer& l, const model::Options* options) {
  model::blocks_launched = model::bank_conflicts = 0;
  model::set_options(*options);
  model::clear_ranges();
  allow(l.weight, l.n, l.k, false);
  allow(l.u, l.n, false);
  allow(l.v, l.groups * l.k, false);
}

}  // namespace
}  // namespace rlrr

extern "C" {

int64_t model_forward_workspace_floats(const rlrr::Forward* f) { return rlrr::floats(*f); }
int64_t model_grad_input_workspace_floats(const rlrr::GradInput* g) { return rlrr::floats(*g); }
int64_t model_grad_scales_workspace_floats(const rlrr::GradScales* g) { return rlrr::floats(*g); }

int model_forward(const rlrr::Forward* f, const rlrr::model::Options* options) {
  const auto& l = f->layer;
  rlrr::begin(l, options);
  rlrr::allow(f->x, l.m, l.k, false);
  rlrr::allow(f->bias, l.n);
  rlrr::allow(f->shift, l.n);
  rlrr::allow(f->y, l.m, l.n, true);
  rlrr::allow(f->workspace, rlrr::floats(*f), true);
  return rlrr::passes::forward(*f, nullptr);
}

int model_grad_input(const rlrr::GradInput* g, const rlrr::model::Options* options) {
  const auto& l = g->layer;
  rlrr::begin(l, options);
  rlrr::allow(g->dy, l.m, l.n, false);
  rlrr::allow(g->dx, l.m, l.k, true);
  rlrr::allow(g->workspace, rlrr::floats(*g), true);
  return rlrr::passes::grad_input(*g, nullptr);
}

int model_grad_scales(const rlrr::GradScales* g, const rlrr::model::Options* options) {
  const auto& l = g->layer;
  rlrr::begin(l, options);
  rlrr::allow(g->dy, l.m, l.n, false);
  rlrr::allow(g->x, l.m, l.k, false);
  rlrr::allow(g->du, l.n, true);
  rlrr::allow(g->dv, l.groups * l.k, true);
  rlrr::allow(g->df, l.n, true);
  rlrr::allow(g->workspace, rlrr::floats(*g), true);
  return rlrr::passes::grad_scales(*g, nullptr);
}

const char* model_message() { return rlrr::model::message().c_str(); }

// Of the last pass.
int64_t model_blocks_launched() { return rlrr::model::blocks_launched; }
int64_t model_bank_conflicts() { return rlrr::model::bank_conflicts; }

#if defined(RLRR_HOPPER)

bool model_forward_supported(const rlrr::Forward* f) { return rlrr::hopper::supports(*f); }
bool model_grad_input_supported(const rlrr::GradInput* g) { return rlrr::hopper::supports(*g); }
bool model_grad_scales_supported(const rlrr::GradScales* g) { return rlrr::hopper::supports(*g); }

// Since the start of the process.
int64_t model_maps_encoded() { return rlrr::model::maps_encoded; }

// Writes a tensor map to `to`, which need not be aligned; for float32 that of scales.
int model_describe(const rlrr::Matrix* matrix, int64_t rows, int64_t cols, int box_rows, void* to) {
  CUtensorMap map = {};
  const cudaError_t error = matrix->dtype == rlrr::Dtype::float32
                                ? rlrr::hopper::describe(map, static_cast<const float*>(matrix->data), rows, cols)
                                : rlrr::hopper::describe(map, *matrix, rows, cols, box_rows);
  std::memcpy(to, &map, sizeof map);
  return error;
}

// For a matrix at this address of the shared window, which can be larger than the memory of the model.
uint64_t model_matrix_descriptor(uint32_t address, int next_box) {
  const auto base = reinterpret_cast<uintptr_t>(rlrr::ptx::swizzled_shared_memory());
  return rlrr::hopper::matrix_descriptor(reinterpret_cast<const char*>(base + address), next_box);
}

int model_hang() {
  rlrr::model::set_options({});
  return rlrr::ptx::launch_warpgroups<rlrr::hanging_kernel>(2, sizeof(rlrr::hopper::Ring<2>), nullptr, 0);
}

int model_tile_tokens(int64_t tokens, int64_t row_tiles, int64_t steps, int multiprocessors) {
  return rlrr::hopper::tile_tokens(tokens, row_tiles, steps, {90, multiprocessors, 227 * 1024});
}

#endif

}  // extern "C"
