// The experimental Hopper path (sm_90a): bulk tensor copies, wgmma, warp specialisation.
//
// Same contracts as ../launch.h. `supports` says whether a problem fits it (dtypes, alignment, strides,
// capability 9.0); the caller must ask first and use ../launch.h for the rest.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace rlrr::hopper {

bool supports(const Forward& problem);
bool supports(const GradInput& problem);
bool supports(const GradScales& problem);

cudaError_t forward(const Forward& problem, cudaStream_t stream);
cudaError_t grad_input(const GradInput& problem, cudaStream_t stream);
cudaError_t grad_scales(const GradScales& problem, cudaStream_t stream);

int64_t workspace_floats(const GradScales& problem);

}  // namespace rlrr::hopper
