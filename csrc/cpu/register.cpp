// The CPU ops as torch sees them: rlrr_cpu::{forward, grad_input, grad_scales}, by the stable ABI alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "loops.h"
#include "passes.h"
#include "runtime.h"

namespace rlrr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);

ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::float64   ? ScalarType::Double
         : dtype == Dtype::float32 ? ScalarType::Float
                                   : ScalarType::BFloat16;
}

Dtype dtype_from(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float64");
      return {};
  }
}

Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.numel() > 0, name, ": expected sizes of at least 1, got [", tensor.size(0), ", ",
                  tensor.size(1), "]");
  return {tensor.data_ptr(), tensor.size(0),   tensor.size(1),
          tensor.stride(0),  tensor.stride(1), dtype_from(tensor, name)};
}

Tensor view(const Matrix& a) {
  const std::array<int64_t, 2> sizes{a.rows, a.cols}, strides{a.row_stride, a.col_stride};
  return torch::stable::from_blob(a.data, sizes, strides, cpu, scalar_type(a.dtype));
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  return torch::stable::empty(sizes, dtype, std::nullopt, cpu);
}

// A vector in `dtype`, contiguous: the tensor itself wherever it is that already
Tensor as(const Tensor& tensor, ScalarType dtype) {
  // asked here: the two calls that would find it out take as long as a small product
  if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

// An operand with its owners: views of u and v in the type of the sums
struct LayerOwner {
  Tensor u, v;
  Layer layer;

  LayerOwner(const Matrix& x, const char* x_name, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in)
      : u(as(scale_out, wide(x.dtype))), v(as(scale_in, wide(x.dtype))) {
    layer = {matrix(weight, "weight"), u.data_ptr(), v.data_ptr(), scale_in.dim() == 3 ? scale_in.size(0) : 0};
    const int64_t n = layer.n(), k = layer.k();
    STD_TORCH_CHECK((x.dtype == Dtype::float64) == (layer.weight.dtype == Dtype::float64), x_name,
                    ": float64 goes with a float64 weight only");
    STD_TORCH_CHECK(u.dim() == 2 && u.size(0) == n && u.size(1) == 1, "scale_out: expected shape [", n, ", 1]");
    STD_TORCH_CHECK(v.dim() == 3 && v.size(0) > 0 && n % v.size(0) == 0 && v.size(1) == 1 && v.size(2) == k,
                    "scale_in: expected shape [groups, 1, ", k, "] with groups that divide ", n);
  }

  static ScalarType wide(Dtype dtype) { return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float; }
};

struct ScratchOwner {
  Tensor tensor;
  Scratch scratch;

  ScratchOwner(Pass pass, const Matrix& rows, const Layer& layer) {
    const int64_t threads = thread_count(), bytes = scratch_bytes(pass, rows, layer, threads);
    tensor = empty({bytes}, ScalarType::Byte);
    scratch = {tensor.data_ptr(), bytes, threads};
  }
};

Tensor forward_op(const Tensor& x, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& shift) {
  const Matrix input = matrix(x, "x");
  const LayerOwner owner(input, "x", weight, scale_out, scale_in);
  const Layer& layer = owner.layer;
  STD_TORCH_CHECK(input.cols == layer.k(), "x: expected ", layer.k(), " columns, got ", input.cols);
  Tensor y = empty({input.rows, layer.n()}, x.scalar_type());
  const auto wide = LayerOwner::wide(input.dtype);
  std::optional<Tensor> offset = bias ? bias : shift;
  if (offset) {
    offset = bias && shift ? torch::stable::subtract(as(*bias, wide), as(*shift, wide), -1.0) : as(*offset, wide);
    STD_TORCH_CHECK(offset->dim() == 1 && offset->size(0) == layer.n(), "bias, shift: expected shape [", layer.n(),
                    "]");
  }
  const ScratchOwner owned(Pass::forward, input, layer);
  forward(input, layer, offset ? offset->data_ptr() : nullptr, matrix(y, "y"), owned.scratch);
  return y;
}

Tensor grad_input_op(const Tensor& dy, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in) {
  const Matrix grad = matrix(dy, "dy");
  const LayerOwner owner(grad, "dy", weight, scale_out, scale_in);
  const Layer& layer = owner.layer;
  STD_TORCH_CHECK(grad.cols == layer.n(), "dy: expected ", layer.n(), " columns, got ", grad.cols);
  Tensor dx = empty({grad.rows, layer.k()}, dy.scalar_type());
  const ScratchOwner owned(Pass::grad_input, grad, layer);
  grad_input(grad, layer, matrix(dx, "dx"), owned.scratch);
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> grad_scales_op(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                  const Tensor& scale_out, const Tensor& scale_in, bool need_shift) {
  const Matrix grad = matrix(dy, "dy"), input = matrix(x, "x");
  STD_TORCH_CHECK(grad.dtype == input.dtype, "dy: expected x's dtype");
  const LayerOwner owner(input, "x", weight, scale_out, scale_in);
  const Layer& layer = owner.layer;
  STD_TORCH_CHECK(input.cols == layer.k(), "x: expected ", layer.k(), " columns, got ", input.cols);
  STD_TORCH_CHECK(grad.rows == input.rows && grad.cols == layer.n(), "dy: expected shape [", input.rows, ", ",
                  layer.n(), "], got [", grad.rows, ", ", grad.cols, "]");
  const auto wide = LayerOwner::wide(input.dtype);
  Tensor du = empty({layer.n(), 1}, wide), dv = empty({layer.groups, 1, layer.k()}, wide);
  Tensor df = empty({need_shift ? layer.n() : 0}, wide);
  const ScratchOwner owned(Pass::grad_scales, input, layer);
  grad_scales(grad, input, layer, du.data_ptr(), dv.data_ptr(), owned.scratch);
  if (need_shift) sum_tokens(grad, df.data_ptr());
  return {du, dv, df};
}

Tensor grad_shift_op(const Tensor& dy) {
  const Matrix grad = matrix(dy, "dy");
  Tensor df = empty({grad.cols}, LayerOwner::wide(grad.dtype));
  sum_tokens(grad, df.data_ptr());
  return df;
}

std::string build() { return std::string(RLRR_BUILD) + ", instructions used here: " + capability(); }

}  // namespace

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

void matmul(const Matrix& a, const Matrix& b, const Matrix& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(view(a)), torch::stable::detail::from(view(b)),
                                    torch::stable::detail::from(view(out))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

void linear(const Matrix& x, const Matrix& w, const void* offset, const Matrix& out) {
  if (offset == nullptr) return matmul(x, w.transposed(), out);
  const std::array<int64_t, 1> sizes{w.rows}, strides{1};
  const Tensor addend =
      torch::stable::from_blob(const_cast<void*>(offset), sizes, strides, cpu, scalar_type(out.dtype));
  std::array<StableIValue, 4> stack{torch::stable::detail::from(view(x)), torch::stable::detail::from(view(w)),
                                    torch::stable::detail::from(std::optional<Tensor>(addend)),
                                    torch::stable::detail::from(view(out))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

STABLE_TORCH_LIBRARY(rlrr_cpu, library) {
  library.def(
      "forward(Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, Tensor? bias, Tensor? shift) -> Tensor");
  library.def("grad_input(Tensor dy, Tensor weight, Tensor scale_out, Tensor scale_in) -> Tensor");
  library.def(
      "grad_scales(Tensor dy, Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, bool need_shift)"
      " -> (Tensor, Tensor, Tensor)");
  library.def("grad_shift(Tensor dy) -> Tensor");
  library.def("build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rlrr_cpu, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward_op));
  library.impl("grad_input", TORCH_BOX(&grad_input_op));
  library.impl("grad_scales", TORCH_BOX(&grad_scales_op));
  library.impl("grad_shift", TORCH_BOX(&grad_shift_op));
}

STABLE_TORCH_LIBRARY_IMPL(rlrr_cpu, CompositeExplicitAutograd, library) { library.impl("build", TORCH_BOX(&build)); }

}  // namespace rlrr
