// The CUDA ops as torch sees them: rlrr_cuda::{forward, grad_input, grad_scales}, by the stable ABI alone.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "launch.h"
#if RLRR_HOPPER
#include "hopper/launch.h"
#endif

namespace rlrr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error, const char* what) {
  // taken off the runtime's record, or the next launch would report it once more
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  STD_TORCH_CHECK(error == cudaSuccess, "rlrr_cuda::", what, ": ", cudaGetErrorString(error));
}

Device device_at(int32_t index) {
  constexpr int32_t most = 64;
  static std::array<std::once_flag, most> once;
  static std::array<Device, most> devices;
  STD_TORCH_CHECK(index >= 0 && index < most, "rlrr_cuda: device index ", index, " is not below ", most);
  std::call_once(once[index], [&] {
    const auto read = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, index), "device attributes");
      return value;
    };
    const int major = read(cudaDevAttrComputeCapabilityMajor), minor = read(cudaDevAttrComputeCapabilityMinor);
    devices[index] = {10 * major + minor, read(cudaDevAttrMultiProcessorCount),
                      read(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
  });
  return devices[index];
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16");
      return {};
  }
}

Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, ": expected 2 dimensions, got ", tensor.dim());
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor, name)};
}

Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  // asked here: the two calls that would find it out take as long as a launch
  if (tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  return torch::stable::contiguous(torch::stable::to(tensor, dtype));
}

void same_device(const Tensor& tensor, const Tensor& as, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == as.get_device_index(), name,
                  ": expected the device of the other tensors, cuda:", as.get_device_index());
}

// A bias or shift as the kernels read it: float64 has no place on the way to a float32 sum
std::optional<Tensor> addend(const std::optional<Tensor>& given, const Tensor& rows, int64_t n) {
  if (!given) return std::nullopt;
  same_device(*given, rows, "bias, shift");
  STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == n, "bias, shift: expected shape [", n, "]");
  const ScalarType own = given->scalar_type();
  return contiguous_as(*given, own == ScalarType::Double ? ScalarType::Float : own);
}

Vector vector(const std::optional<Tensor>& tensor) {
  return tensor ? Vector{tensor->data_ptr(), dtype_of(*tensor, "bias, shift")} : Vector{nullptr, Dtype::float32};
}

// A layer with the owners of its u and v; `rows` is x or dy, whose device is used
struct LayerOwner {
  Tensor u, v;
  Layer layer;

  LayerOwner(const Tensor& rows, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in, bool tf32)
      : u(contiguous_as(scale_out, ScalarType::Float)), v(contiguous_as(scale_in, ScalarType::Float)) {
    same_device(weight, rows, "weight");
    same_device(scale_out, rows, "scale_out");
    same_device(scale_in, rows, "scale_in");
    const Matrix w = matrix(weight, "weight");
    const int64_t n = weight.size(0), k = weight.size(1);
    STD_TORCH_CHECK(u.dim() == 2 && u.size(0) == n && u.size(1) == 1, "scale_out: expected shape [", n, ", 1]");
    STD_TORCH_CHECK(v.dim() == 3 && v.size(0) > 0 && n % v.size(0) == 0 && v.size(1) == 1 && v.size(2) == k,
                    "scale_in: expected shape [groups, 1, ", k, "] with groups that divide ", n);
    layer = {rows.size(0),
             n,
             k,
             v.size(0),
             w,
             static_cast<const float*>(u.data_ptr()),
             static_cast<const float*>(v.data_ptr()),
             tf32,
             device_at(rows.get_device_index())};
  }
};

// Runs on the stream that is torch's current one on the tensor's device.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Place(const Tensor& tensor) : guard(tensor.get_device_index()) {
    // torch's guard does nothing on a thread that is on this device already, and such a thread, as autograd's
    // own may be, can still lack the context that encoding a tensor map asks for
    check(cudaSetDevice(tensor.get_device_index()), "device");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// The owner of a pass's workspace; freed behind the launch, it is not handed out before the stream has done with it.
template <class Problem>
std::optional<Tensor> scratch(Problem& problem, int64_t floats, const Tensor& like) {
  if (floats == 0) return std::nullopt;
  Tensor owner = empty({floats}, ScalarType::Float, like);
  problem.workspace = static_cast<float*>(owner.data_ptr());
  return owner;
}

Tensor forward_op(const Tensor& x, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& shift, bool tf32, bool hopper) {
  const Matrix input = matrix(x, "x");
  const Place place(x);
  const LayerOwner owner(x, weight, scale_out, scale_in, tf32);
  const Layer& layer = owner.layer;
  STD_TORCH_CHECK(x.size(1) == layer.k, "x: expected ", layer.k, " columns, got ", x.size(1));
  const auto b = addend(bias, x, layer.n), f = addend(shift, x, layer.n);
  Tensor y = empty({layer.m, layer.n}, x.scalar_type(), x);
  Forward problem{layer, input, vector(b), vector(f), matrix(y, "y"), nullptr};
#if RLRR_HOPPER
  if (hopper && hopper::supports(problem)) {
    check(hopper::forward(problem, place.stream), "forward (hopper)");
    return y;
  }
#endif
  const auto workspace = scratch(problem, workspace_floats(problem), x);
  check(forward(problem, place.stream), "forward");
  return y;
}

Tensor grad_input_op(const Tensor& dy, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in, bool tf32,
                     bool hopper) {
  const Matrix grad = matrix(dy, "dy");
  const Place place(dy);
  const LayerOwner owner(dy, weight, scale_out, scale_in, tf32);
  const Layer& layer = owner.layer;
  STD_TORCH_CHECK(dy.size(1) == layer.n, "dy: expected ", layer.n, " columns, got ", dy.size(1));
  Tensor dx = empty({layer.m, layer.k}, dy.scalar_type(), dy);
  GradInput problem{layer, grad, matrix(dx, "dx"), nullptr};
#if RLRR_HOPPER
  if (hopper && hopper::supports(problem)) {
    check(hopper::grad_input(problem, place.stream), "grad_input (hopper)");
    return dx;
  }
#endif
  const auto workspace = scratch(problem, workspace_floats(problem), dy);
  check(grad_input(problem, place.stream), "grad_input");
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> grad_scales_op(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                  const Tensor& scale_out, const Tensor& scale_in, bool need_shift,
                                                  bool tf32, bool hopper) {
  const Matrix grad = matrix(dy, "dy"), input = matrix(x, "x");
  STD_TORCH_CHECK(grad.dtype == input.dtype, "dy: expected x's dtype");
  same_device(dy, x, "dy");
  const Place place(x);
  const LayerOwner owner(x, weight, scale_out, scale_in, tf32);
  const Layer& layer = owner.layer;
  STD_TORCH_CHECK(x.size(1) == layer.k, "x: expected ", layer.k, " columns, got ", x.size(1));
  STD_TORCH_CHECK(dy.size(0) == layer.m && dy.size(1) == layer.n, "dy: expected shape [", layer.m, ", ", layer.n,
                  "], got [", dy.size(0), ", ", dy.size(1), "]");
  const auto floats = [&](std::initializer_list<int64_t> sizes) {
    return empty({sizes.begin(), sizes.size()}, ScalarType::Float, x);
  };
  Tensor du = floats({layer.n, 1}), dv = floats({layer.groups, 1, layer.k}), df = floats({need_shift ? layer.n : 0});
  GradScales problem{layer,
                     grad,
                     input,
                     static_cast<float*>(du.data_ptr()),
                     static_cast<float*>(dv.data_ptr()),
                     need_shift ? static_cast<float*>(df.data_ptr()) : nullptr,
                     nullptr};
  const auto run = [&](auto size, auto launch, const char* name) {
    const auto workspace = scratch(problem, size(problem), x);
    check(launch(problem, place.stream), name);
  };
#if RLRR_HOPPER
  if (hopper && hopper::supports(problem)) {
    run(hopper::workspace_floats, hopper::grad_scales, "grad_scales (hopper)");
    return {du, dv, df};
  }
#endif
  run([](const GradScales& g) { return workspace_floats(g); }, grad_scales, "grad_scales");
  return {du, dv, df};
}

std::string unusable_op(int64_t device) { return unusable(static_cast<int>(device)); }

std::string build() {
  return std::string(RLRR_BUILD) + ", CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
         std::to_string(CUDART_VERSION % 1000 / 10) + ", compute capabilities " + RLRR_ARCHITECTURES;
}

STABLE_TORCH_LIBRARY(rlrr_cuda, library) {
  library.def(
      "forward(Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, Tensor? bias, Tensor? shift, bool tf32,"
      " bool hopper) -> Tensor");
  library.def(
      "grad_input(Tensor dy, Tensor weight, Tensor scale_out, Tensor scale_in, bool tf32, bool hopper) -> Tensor");
  library.def(
      "grad_scales(Tensor dy, Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, bool need_shift, bool tf32,"
      " bool hopper) -> (Tensor, Tensor, Tensor)");
  library.def("unusable(int device) -> str");
  library.def("build() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(rlrr_cuda, CUDA, library) {
  library.impl("forward", TORCH_BOX(&forward_op));
  library.impl("grad_input", TORCH_BOX(&grad_input_op));
  library.impl("grad_scales", TORCH_BOX(&grad_scales_op));
}

STABLE_TORCH_LIBRARY_IMPL(rlrr_cuda, CompositeExplicitAutograd, library) {
  library.impl("unusable", TORCH_BOX(&unusable_op));
  library.impl("build", TORCH_BOX(&build));
}

}  // namespace
}  // namespace rlrr
