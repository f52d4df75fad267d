// A stand-in for CUDA's header where a host compiler builds device.cu.
#pragma once

#include <cuda_runtime_api.h>

#define __global__
