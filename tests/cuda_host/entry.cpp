// What the tests call through ctypes: the library's own entry points, with the machine's options.
#include "machine.cuh"

#include "launch.h"
#include "ranges.h"

namespace rlrr {

// a test of one pass builds that one alone
[[gnu::weak]] cudaError_t forward(const Forward&, cudaStream_t);
[[gnu::weak]] cudaError_t grad_input(const GradInput&, cudaStream_t);
[[gnu::weak]] cudaError_t grad_scales(const GradScales&, cudaStream_t);
[[gnu::weak]] int64_t workspace_floats(const Forward&);
[[gnu::weak]] int64_t workspace_floats(const GradInput&);
[[gnu::weak]] int64_t workspace_floats(const GradScales&);

namespace {

void start(const Layer& l, const model::Options* options) {
  model::blocks_launched = model::bank_conflicts = 0;
  begin(l, options);
}

}  // namespace
}  // namespace rlrr

extern "C" {

int64_t model_forward_workspace_floats(const rlrr::Forward* f) { return rlrr::workspace_floats(*f); }
int64_t model_grad_input_workspace_floats(const rlrr::GradInput* g) { return rlrr::workspace_floats(*g); }
int64_t model_grad_scales_workspace_floats(const rlrr::GradScales* g) { return rlrr::workspace_floats(*g); }

int model_forward(const rlrr::Forward* f, const rlrr::model::Options* options) {
  const auto& l = f->layer;
  rlrr::start(l, options);
  rlrr::allow(f->x, l.m, l.k, false);
  rlrr::allow(f->bias, l.n);
  rlrr::allow(f->shift, l.n);
  rlrr::allow(f->y, l.m, l.n, true);
  rlrr::allow(f->workspace, rlrr::workspace_floats(*f), true);
  return rlrr::forward(*f, nullptr);
}

int model_grad_input(const rlrr::GradInput* g, const rlrr::model::Options* options) {
  const auto& l = g->layer;
  rlrr::start(l, options);
  rlrr::allow(g->dy, l.m, l.n, false);
  rlrr::allow(g->dx, l.m, l.k, true);
  rlrr::allow(g->workspace, rlrr::workspace_floats(*g), true);
  return rlrr::grad_input(*g, nullptr);
}

int model_grad_scales(const rlrr::GradScales* g, const rlrr::model::Options* options) {
  const auto& l = g->layer;
  rlrr::start(l, options);
  rlrr::allow(g->dy, l.m, l.n, false);
  rlrr::allow(g->x, l.m, l.k, false);
  rlrr::allow(g->du, l.n, true);
  rlrr::allow(g->dv, l.groups * l.k, true);
  rlrr::allow(g->df, l.n, true);
  rlrr::allow(g->workspace, rlrr::workspace_floats(*g), true);
  return rlrr::grad_scales(*g, nullptr);
}

// Of the last call.
int64_t model_blocks_launched() { return rlrr::model::blocks_launched; }
int64_t model_bank_conflicts() { return rlrr::model::bank_conflicts; }

const char* model_message() { return rlrr::model::message().c_str(); }

}  // extern "C"
