// What the tests call through ctypes: the library's own entry points, with the machine's options.
#include <hopper_model.h>

#include <cstring>

#include "../ranges.h"
#include "hopper/launch.h"
#include "hopper/pipeline.cuh"
#include "hopper/plan.h"
#include "hopper/tensor_map.h"
#include "hopper/tile.cuh"

namespace rlrr::model {
extern int64_t maps_encoded;
}

namespace rlrr::hopper {
namespace {

// The second block's fetching thread claims stages, of which no box lands and no reader releases any.
RLRR_HOPPER_KERNEL hanging_kernel(RLRR_PARAMETER int) {
  auto& ring = *reinterpret_cast<Ring<2>*>(ptx::swizzled_shared_memory());
  if (ptx::block() == 0) return;
  if (ptx::thread() == 0) ring.init(1);
  ptx::barrier();
  Place<2> place;
  if (ptx::thread() == 0) {
    for (int step = 0; step < 4; ++step, place.next()) place.claim(ring, 1024);
  } else if (ptx::thread() / 32 == 5) {
    place.next();
    place.await(ring);
  }
}

}  // namespace
}  // namespace rlrr::hopper

extern "C" {

// Since the start.
int64_t model_maps_encoded() { return rlrr::model::maps_encoded; }

// Into `to`, which need not be aligned. Of float32: as scales are described.
int model_describe(const rlrr::Matrix* matrix, int64_t rows, int64_t cols, int box_rows, void* to) {
  CUtensorMap map = {};
  const cudaError_t error = matrix->dtype == rlrr::Dtype::float32
                                ? rlrr::hopper::describe(map, static_cast<const float*>(matrix->data), rows, cols)
                                : rlrr::hopper::describe(map, *matrix, rows, cols, box_rows);
  std::memcpy(to, &map, sizeof map);
  return error;
}

// Of a matrix at this address of the shared window, where the machine need have none.
uint64_t model_matrix_descriptor(uint32_t address, int next_box) {
  const auto base = reinterpret_cast<uintptr_t>(rlrr::ptx::swizzled_shared_memory());
  return rlrr::hopper::matrix_descriptor(reinterpret_cast<const char*>(base + address), next_box);
}

int model_hang() {
  using rlrr::hopper::Ring;
  rlrr::model::set_options({});
  return rlrr::ptx::launch_warpgroups<rlrr::hopper::hanging_kernel>(2, sizeof(Ring<2>), nullptr, 0);
}

bool model_forward_supported(const rlrr::Forward* f) { return rlrr::hopper::supports(*f); }
bool model_grad_input_supported(const rlrr::GradInput* g) { return rlrr::hopper::supports(*g); }
bool model_grad_scales_supported(const rlrr::GradScales* g) { return rlrr::hopper::supports(*g); }

int model_forward(const rlrr::Forward* f, const rlrr::model::Options* options) {
  const auto& l = f->layer;
  rlrr::begin(l, options);
  rlrr::allow(f->x, l.m, l.k, false);
  rlrr::allow(f->bias, l.n);
  rlrr::allow(f->shift, l.n);
  rlrr::allow(f->y, l.m, l.n, true);
  return rlrr::hopper::forward(*f, nullptr);
}

int model_grad_input(const rlrr::GradInput* g, const rlrr::model::Options* options) {
  const auto& l = g->layer;
  rlrr::begin(l, options);
  rlrr::allow(g->dy, l.m, l.n, false);
  rlrr::allow(g->dx, l.m, l.k, true);
  return rlrr::hopper::grad_input(*g, nullptr);
}

int model_tile_tokens(int64_t tokens, int64_t row_tiles, int64_t steps, int multiprocessors) {
  return rlrr::hopper::tile_tokens(tokens, row_tiles, steps, {90, multiprocessors, 227 * 1024});
}

int64_t model_grad_scales_workspace_floats(const rlrr::GradScales* g) { return rlrr::hopper::workspace_floats(*g); }

int model_grad_scales(const rlrr::GradScales* g, const rlrr::model::Options* options) {
  const auto& l = g->layer;
  rlrr::begin(l, options);
  rlrr::allow(g->dy, l.m, l.n, false);
  rlrr::allow(g->x, l.m, l.k, false);
  rlrr::allow(g->du, l.n, true);
  rlrr::allow(g->dv, l.groups * l.k, true);
  rlrr::allow(g->df, l.n, true);
  rlrr::allow(g->workspace, rlrr::hopper::workspace_floats(*g), true);
  return rlrr::hopper::grad_scales(*g, nullptr);
}

const char* model_message() { return rlrr::model::message().c_str(); }

}  // extern "C"
