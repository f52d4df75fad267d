// What the ops of both libraries do with tensors, by the stable ABI alone. The package has checked the arguments of the
// ops: devices, shapes and dtypes fit together.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <tuple>

namespace rlrr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

// The tensor itself if it is contiguous and of this dtype, else a copy.
inline Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  // the two calls below would check this as well, but take as long as a launch or a small product
  if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

}  // namespace rlrr
