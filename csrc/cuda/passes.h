// What the kernels are told of a pass, with no torch type in it, and the functions that start them.
//
// M, N and K are the numbers of tokens, output features and input features. The rows of W form `groups` equal blocks
// with a v each. Strides are in elements and can have any value; vectors are contiguous.
// S = 1 + u v,  W' = W * S,  y = x W'^T + bias + shift.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace rlrr {

enum class Dtype : int { float32, float16, bfloat16 };

struct Matrix {
  void* data;
  int64_t row_stride;
  int64_t col_stride;
  Dtype dtype;
};

// Absent if data is null.
struct Vector {
  void* data;
  Dtype dtype;
};

// Properties of the GPU; the caller reads them once per device.
struct Device {
  int capability;  // 80 for 8.0, 90 for 9.0
  int multiprocessors;
  int shared_memory;  // bytes available to a block
};

// Sizes and the frozen layer, the same for all three passes.
struct Layer {
  int64_t m, n, k, groups;
  Matrix weight;   // [N, K]
  const float* u;  // [N]
  const float* v;  // [groups, K]
  bool tf32;       // whether tensor cores may compute float32 products
  Device device;
};

struct Forward {
  Layer layer;
  Matrix x;            // [M, K]; its dtype is the dtype of the product
  Vector bias, shift;  // [N] each
  Matrix y;            // [M, N], row-major, x's dtype
  float* workspace;    // as many floats as workspace_floats() says
};

struct GradInput {
  Layer layer;
  Matrix dy;         // [M, N]
  Matrix dx;         // [M, K], row-major, dy's dtype
  float* workspace;  // as many floats as workspace_floats() says
};

struct GradScales {
  Layer layer;
  Matrix dy;         // [M, N], x's dtype
  Matrix x;          // [M, K]
  float* du;         // [N]
  float* dv;         // [groups, K]
  float* df;         // [N], or null if it is not wanted
  float* workspace;  // as many floats as workspace_floats() says
};

// Each function enqueues its work on `stream` of the current device and returns the error of the launch. Results do not
// depend on the order in which blocks run.
cudaError_t forward(const Forward& problem, cudaStream_t stream);
cudaError_t grad_input(const GradInput& problem, cudaStream_t stream);
cudaError_t grad_scales(const GradScales& problem, cudaStream_t stream);

// The size of the workspace that a pass needs for these sizes and dtypes; may be 0. Pointers are not read.
int64_t workspace_floats(const Forward& problem);
int64_t workspace_floats(const GradInput& problem);
int64_t workspace_floats(const GradScales& problem);

// Why no kernel of this library can run on a device (the driver is too old, or the library holds no code for it), or an
// empty string. `architectures` names those that the library was built for. The current device does not change.
std::string unusable(int device, const char* architectures);

// The experimental Hopper path (sm_90a): bulk tensor copies, wgmma, specialised warps. The functions do the same as
// those above, for the problems that `supports` accepts (by dtype, alignment, strides, compute capability 9.0).
namespace hopper {

bool supports(const Forward& problem);
bool supports(const GradInput& problem);
bool supports(const GradScales& problem);

cudaError_t forward(const Forward& problem, cudaStream_t stream);
cudaError_t grad_input(const GradInput& problem, cudaStream_t stream);
cudaError_t grad_scales(const GradScales& problem, cudaStream_t stream);

int64_t workspace_floats(const GradScales& problem);

}  // namespace hopper

}  // namespace rlrr
