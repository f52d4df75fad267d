// Asks the runtime to load a kernel, without running it: the driver and the device must both suit the library.
#include "launch.h"

namespace rlrr {
namespace {

__global__ void nothing() {}

}  // namespace

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, nothing);
}

}  // namespace rlrr
