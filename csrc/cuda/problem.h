// What a kernel needs to know of its tensors, with no torch type in it.
//
// Letters as everywhere in the package: M tokens, N output features, K input features; the rows of
// W form `groups` equal blocks with a v each. Strides are in elements and may be anything; vectors
// are contiguous. S = 1 + u v,  W' = W * S,  y = x W'^T + bias + shift.
#pragma once

#include <cstdint>

namespace rlrr {

enum class Dtype : int { float32, float16, bfloat16 };

struct Matrix {
  void* data;
  int64_t row_stride;
  int64_t col_stride;
  Dtype dtype;
};

// Absent where data is null.
struct Vector {
  void* data;
  Dtype dtype;
};

// What the GPU at hand offers; read once per device by the caller.
struct Device {
  int capability;  // 80 for 8.0, 90 for 9.0
  int multiprocessors;
  int shared_memory;  // bytes a block may ask for
};

// Sizes and the frozen layer, the same for all three passes.
struct Layer {
  int64_t m, n, k, groups;
  Matrix weight;   // [N, K]
  const float* u;  // [N]
  const float* v;  // [groups, K]
  bool tf32;       // float32 products may go through the tensor cores
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
  float* df;         // [N], or null where nobody asks for it
  float* workspace;  // as many floats as workspace_floats() says
};

}  // namespace rlrr
