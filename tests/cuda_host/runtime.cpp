// A stand-in for the runtime with two devices: it records the current one, and fails as it is told. For the tests of
// csrc/cuda/device.cu.
#include <cuda_runtime_api.h>

#include <string>

#include "passes.h"

namespace {

constexpr int kDevices = 2;
int current = 0, probed = -1;
cudaError_t on_get = cudaSuccess, on_set = cudaSuccess, on_probe = cudaSuccess, recorded = cudaSuccess;

cudaError_t record(cudaError_t error) { return error == cudaSuccess ? error : recorded = error; }

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  if (on_get == cudaSuccess) *device = current;
  return record(on_get);
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return record(cudaErrorInvalidDevice);
  current = device;
  // as in CUDA 12 and later, the device is current even if its context cannot be created
  return record(device == 1 ? on_set : cudaSuccess);
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t last = recorded;
  recorded = cudaSuccess;
  return last;
}
const char* cudaGetErrorString(cudaError_t error) {
  static std::string text;
  return (text = "error " + std::to_string(error)).c_str();
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)()) {
  probed = current;
  return record(on_probe);
}

extern "C" {

void runtime_begin(int device, int get, int set, int probe) {
  current = device, probed = -1, recorded = cudaSuccess;
  on_get = static_cast<cudaError_t>(get), on_set = static_cast<cudaError_t>(set);
  on_probe = static_cast<cudaError_t>(probe);
}
const char* runtime_unusable(int device) {
  static std::string reason;
  return (reason = rlrr::unusable(device, "80 90a")).c_str();
}
int runtime_current() { return current; }
int runtime_probed() { return probed; }
int runtime_recorded() { return recorded; }

}  // extern "C"
