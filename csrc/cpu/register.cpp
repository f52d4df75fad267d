// The CPU ops as torch sees them: rlrr_cpu::{forward, grad_input, grad_scales, grad_shift}.
#include <array>

#include "../tensors.h"
#include "passes.h"
#include "runtime.h"

namespace rlrr {
namespace {

const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);

ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::float64   ? ScalarType::Double
         : dtype == Dtype::float32 ? ScalarType::Float
                                   : ScalarType::BFloat16;
}

// The dtype of the sums of x or dy
ScalarType wide_type(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Dtype dtype_from(const Tensor& tensor) {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float64}) {
    if (scalar_type(dtype) == tensor.scalar_type()) return dtype;
  }
  STD_TORCH_CHECK(false, "rlrr_cpu: expected float32, bfloat16 or float64");
  return {};
}

Matrix matrix(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0), tensor.stride(1), dtype_from(tensor)};
}

Tensor view(const Matrix& a) {
  const std::array<int64_t, 2> sizes{a.rows, a.cols}, strides{a.row_stride, a.col_stride};
  return torch::stable::from_blob(a.data, sizes, strides, cpu, scalar_type(a.dtype));
}

// A layer, and the owners of its u and v
struct LayerOwner {
  Tensor u, v;
  Layer layer;

  LayerOwner(const Tensor& rows, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in)
      : u(contiguous_as(scale_out, wide_type(rows))),
        v(contiguous_as(scale_in, wide_type(rows))),
        layer{matrix(weight), u.data_ptr(), v.data_ptr(), scale_in.size(0), scale_out.size(1)} {}
};

struct ScratchOwner {
  Tensor tensor;
  Scratch scratch;

  ScratchOwner(const Passes& passes, Pass pass, const Matrix& rows, const Layer& layer) {
    const int64_t threads = thread_count(), bytes = passes.scratch_bytes(pass, rows, layer, threads);
    tensor = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, cpu);
    scratch = {tensor.data_ptr(), bytes, threads};
  }
};

Tensor forward_op(const Tensor& x, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& shift) {
  const Matrix input = matrix(x);
  const LayerOwner owner(x, weight, scale_out, scale_in);
  const Layer& layer = owner.layer;
  const Passes& passes = passes_for(input.dtype);
  Tensor y = empty({input.rows, layer.n()}, x.scalar_type(), x);
  const ScalarType wide = wide_type(x);
  std::optional<Tensor> offset = bias ? bias : shift;
  if (offset) offset = contiguous_as(*offset, wide);
  if (bias && shift) offset = torch::stable::subtract(*offset, contiguous_as(*shift, wide), -1.0);
  const ScratchOwner owned(passes, Pass::forward, input, layer);
  passes.forward(input, layer, offset ? offset->data_ptr() : nullptr, matrix(y), owned.scratch);
  return y;
}

Tensor grad_input_op(const Tensor& dy, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in) {
  const Matrix grad = matrix(dy);
  const LayerOwner owner(dy, weight, scale_out, scale_in);
  const Layer& layer = owner.layer;
  const Passes& passes = passes_for(grad.dtype);
  Tensor dx = empty({grad.rows, layer.k()}, dy.scalar_type(), dy);
  const ScratchOwner owned(passes, Pass::grad_input, grad, layer);
  passes.grad_input(grad, layer, matrix(dx), owned.scratch);
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> grad_scales_op(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                  const Tensor& scale_out, const Tensor& scale_in, bool need_shift) {
  const Matrix grad = matrix(dy), input = matrix(x);
  const LayerOwner owner(x, weight, scale_out, scale_in);
  const Layer& layer = owner.layer;
  const Passes& passes = passes_for(input.dtype);
  const ScalarType wide = wide_type(x);
  Tensor du = empty({layer.n(), layer.rank}, wide, x), dv = empty({layer.groups, layer.rank, layer.k()}, wide, x);
  Tensor df = empty({need_shift ? layer.n() : 0}, wide, x);
  const ScratchOwner owned(passes, Pass::grad_scales, input, layer);
  passes.grad_scales(grad, input, layer, du.data_ptr(), dv.data_ptr(), owned.scratch);
  if (need_shift) sum_tokens(grad, df.data_ptr());
  return {du, dv, df};
}

Tensor grad_shift_op(const Tensor& dy) {
  const Matrix grad = matrix(dy);
  Tensor df = empty({grad.cols}, wide_type(dy), dy);
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
