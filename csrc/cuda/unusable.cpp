// Whether the library suits the driver and a device.
#include <cuda_runtime_api.h>

#include <string>

#include "launch.h"

namespace rlrr {

std::string unusable(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  const bool elsewhere = error == cudaSuccess && before != device;
  if (elsewhere) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = probe();
  // the thread's device is the caller's
  if (elsewhere) static_cast<void>(cudaSetDevice(before));
  if (error == cudaSuccess) return "";
  // taken off the runtime's record, or the next launch would report it once more
  static_cast<void>(cudaGetLastError());
  int driver = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  return std::string(cudaGetErrorString(error)) + " (built with CUDA " + version(CUDART_VERSION) + " for " +
         RLRR_ARCHITECTURES + ", the driver serves CUDA " + version(driver) + ")";
}

}  // namespace rlrr
