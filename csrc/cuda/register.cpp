// The CUDA ops as torch sees them: rlrr_cuda::{forward, grad_input, grad_scales}.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <mutex>

#include "../tensors.h"
#include "passes.h"

namespace rlrr {
namespace {

void check(cudaError_t error, const char* what) {
  // cleared, or the next launch would report it once more
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

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "rlrr_cuda: expected float32, float16 or bfloat16");
      return {};
  }
}

Matrix matrix(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor)};
}

// A bias or shift as the kernels read it; float64 is converted, as sums are in float32
std::optional<Tensor> addend(const std::optional<Tensor>& given) {
  if (!given) return std::nullopt;
  const ScalarType own = given->scalar_type();
  return contiguous_as(*given, own == ScalarType::Double ? ScalarType::Float : own);
}

Vector vector(const std::optional<Tensor>& tensor) {
  return tensor ? Vector{tensor->data_ptr(), dtype_of(*tensor)} : Vector{nullptr, Dtype::float32};
}

// A layer, and the owners of its u and v; `rows` is x or dy
struct LayerOwner {
  Tensor u, v;
  Layer layer;

  LayerOwner(const Tensor& rows, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in, bool tf32)
      : u(contiguous_as(scale_out, ScalarType::Float)),
        v(contiguous_as(scale_in, ScalarType::Float)),
        layer{rows.size(0),
              weight.size(0),
              weight.size(1),
              scale_in.size(0),
              matrix(weight),
              static_cast<const float*>(u.data_ptr()),
              static_cast<const float*>(v.data_ptr()),
              tf32,
              device_at(rows.get_device_index())} {}
};

// The device of a tensor, made current, and torch's current stream on it.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Place(const Tensor& tensor) : guard(tensor.get_device_index()) {
    // the guard does nothing on a thread that is on this device already; but such a thread, for instance one of
    // autograd's, can still lack the context that is needed to encode a tensor map
    check(cudaSetDevice(tensor.get_device_index()), "device");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// The owner of the workspace of a pass. It is freed after the launch: the allocator reuses it for later work of this
// stream only.
template <class Problem>
std::optional<Tensor> scratch(Problem& problem, int64_t floats, const Tensor& like) {
  if (floats == 0) return std::nullopt;
  Tensor owner = empty({floats}, ScalarType::Float, like);
  problem.workspace = static_cast<float*>(owner.data_ptr());
  return owner;
}

Tensor forward_op(const Tensor& x, const Tensor& weight, const Tensor& scale_out, const Tensor& scale_in,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& shift, bool tf32, bool hopper) {
  const Matrix input = matrix(x);
  const Place place(x);
  const LayerOwner owner(x, weight, scale_out, scale_in, tf32);
  const Layer& layer = owner.layer;
  const auto b = addend(bias), f = addend(shift);
  Tensor y = empty({layer.m, layer.n}, x.scalar_type(), x);
  Forward problem{layer, input, vector(b), vector(f), matrix(y), nullptr};
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
  const Matrix grad = matrix(dy);
  const Place place(dy);
  const LayerOwner owner(dy, weight, scale_out, scale_in, tf32);
  const Layer& layer = owner.layer;
  Tensor dx = empty({layer.m, layer.k}, dy.scalar_type(), dy);
  GradInput problem{layer, grad, matrix(dx), nullptr};
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
  const Matrix grad = matrix(dy), input = matrix(x);
  const Place place(x);
  const LayerOwner owner(x, weight, scale_out, scale_in, tf32);
  const Layer& layer = owner.layer;
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

std::string unusable_op(int64_t device) { return unusable(static_cast<int>(device), RLRR_ARCHITECTURES); }

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
