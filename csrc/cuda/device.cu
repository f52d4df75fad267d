// Whether the library suits the driver and a device.
#include <cuda_runtime.h>

#include "passes.h"

namespace rlrr {
namespace {

__global__ void nothing() {}

// Asks the runtime to load a kernel, without running it: the driver and the device must both suit the library.
cudaError_t load_kernel() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, nothing);
}

}  // namespace

std::string unusable(int device, const char* architectures) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  const bool elsewhere = error == cudaSuccess && before != device;
  if (elsewhere) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = load_kernel();
  if (elsewhere) static_cast<void>(cudaSetDevice(before));
  if (error == cudaSuccess) return "";
  // cleared, or the next launch would report it once more
  static_cast<void>(cudaGetLastError());
  int driver = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  return std::string(cudaGetErrorString(error)) + " (built with CUDA " + version(CUDART_VERSION) + " for " +
         architectures + ", the driver serves CUDA " + version(driver) + ")";
}

}  // namespace rlrr
