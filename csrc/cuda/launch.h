// The entry points of the CUDA library's kernels: one a pass, sm_80 and later.
//
// Each enqueues its work on `stream` of the current device and returns the launch's error. Results do
// not depend on the order in which blocks run.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "problem.h"

namespace rlrr {

cudaError_t forward(const Forward& problem, cudaStream_t stream);
cudaError_t grad_input(const GradInput& problem, cudaStream_t stream);
cudaError_t grad_scales(const GradScales& problem, cudaStream_t stream);

// Whether the current device has code of this library to run.
cudaError_t probe();

// Why no kernel of this library can run on a device, or nothing: another driver, or no code for its capability.
// The current device stays what it was.
std::string unusable(int device);

// Floats of scratch that a pass wants for these sizes and dtypes, often none; no pointer of the problem is read.
int64_t workspace_floats(const Forward& problem);
int64_t workspace_floats(const GradInput& problem);
int64_t workspace_floats(const GradScales& problem);

}  // namespace rlrr
