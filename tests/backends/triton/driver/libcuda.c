// A libcuda.so.1 without a GPU: it launches nothing, and refuses what a driver refuses.
//
// Triton's own launcher runs on it. Limits are those of the driver API's manual (cuLaunchKernelEx, cuFuncSetAttribute);
// a call within them is accepted and does nothing. Every call that loads or launches is logged as a line of JSON, with
// the reason if it was refused. The parameters of a launch are read as the GPU would read them: by the table of
// parameters in the kernel's own binary.
//
// Tests call the stand_in_* functions, which describe devices and memory, and return the log.

#include <cuda.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEVICES = 8, FUNCTIONS = 4096, RANGES = 4096, PARAMETERS = 128, REASON = 512, LOG = 1 << 24 };

typedef struct {
  int major, minor, multiprocessors, shared_optin;
  bool present;
} Device;

typedef struct {
  char name[128];
  int device, threads, static_shared, dynamic_shared, parameters;
  uint16_t size[PARAMETERS];
} Function;

static Device devices[DEVICES];
static Function functions[FUNCTIONS];
static int function_count, current = -1;
static struct {
  uint64_t first, end;
} ranges[RANGES];
static int range_count;
static bool capturing;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;  // of a call that is logged, from begin to answer
static char text[LOG], reason[REASON];
static size_t written;

static void note(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  written += vsnprintf(text + written, LOG - written, format, arguments);
  va_end(arguments);
  if (written >= LOG) abort();
}

// Adds to why this call is refused.
static void refuse(const char* format, ...) {
  va_list arguments;
  size_t length = strlen(reason);
  if (length) length += snprintf(reason + length, REASON - length, "; ");
  va_start(arguments, format);
  vsnprintf(reason + length, REASON - length, format, arguments);
  va_end(arguments);
}

static void begin(const char* call) {
  pthread_mutex_lock(&mutex);
  note("{\"call\": \"%s\"", call);
}

static CUresult answer(CUresult refusal) {
  CUresult result = *reason ? refusal : CUDA_SUCCESS;
  note(", \"refused\": \"%s\"}\n", reason);
  *reason = 0;
  pthread_mutex_unlock(&mutex);
  return result;
}

static bool known(uint64_t first, uint64_t end) {
  for (int i = 0; i < range_count; i++)
    if (first >= ranges[i].first && end <= ranges[i].end) return true;
  return false;
}

// The test's side.

void stand_in_device(int index, int major, int minor, int multiprocessors, int shared_optin) {
  devices[index] = (Device){major, minor, multiprocessors, shared_optin, true};
  if (current < 0) current = index;
}
void stand_in_memory(uint64_t first, uint64_t bytes) {
  if (range_count == RANGES) abort();
  ranges[range_count].first = first, ranges[range_count++].end = first + bytes;
}
void stand_in_forget_memory(void) { range_count = 0; }
void stand_in_capture(int on) { capturing = on; }
// The lines since the last call.
const char* stand_in_log(void) {
  text[written] = 0;
  written = 0;
  return text;
}

// Devices and contexts: context i + 1 is device i's, streams are numbered 16 + device.

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13020, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) {
  *count = 0;
  for (int i = 0; i < DEVICES; i++) *count += devices[i].present;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int index) {
  if (index < 0 || index >= DEVICES || !devices[index].present) return CUDA_ERROR_INVALID_DEVICE;
  return *device = index, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)(intptr_t)(current + 1), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return current = (int)(intptr_t)context - 1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)(intptr_t)(device + 1), CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  const Device* d = &devices[device];
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = d->major;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = d->minor;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = d->multiprocessors;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = d->shared_optin;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = d->shared_optin + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 1;
      break;
  }
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** string) {
  *string = error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing"
            : error == CUDA_ERROR_NO_BINARY_FOR_GPU        ? "no kernel image is available for execution on the device"
                                                           : "invalid argument";
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (!known(pointer, pointer)) {
    begin("cuPointerGetAttribute");
    refuse("pointer %#llx is not the device's", (unsigned long long)pointer);
    return answer(CUDA_ERROR_INVALID_VALUE);
  }
  return *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;
}

// Modules: one kernel each, as Triton makes them.

// Sizes of the parameters and threads of a block from .nv.info: (format, attribute, size or value) and size bytes.
static void read_info(Function* f, const uint8_t* at, const uint8_t* end) {
  enum { SIZED = 4, REQUIRED_THREADS = 0x10, PARAMETER = 0x17 };
  while (at + 4 <= end) {
    uint16_t size = at[2] | at[3] << 8;
    const uint8_t* body = at + 4;
    if (at[0] == SIZED && at[1] == PARAMETER) {
      uint16_t ordinal = body[4] | body[5] << 8;
      uint32_t packed;
      memcpy(&packed, body + 8, 4);
      if (ordinal >= PARAMETERS) abort();
      f->size[ordinal] = packed >> 18;
      if (ordinal >= f->parameters) f->parameters = ordinal + 1;
    } else if (at[0] == SIZED && at[1] == REQUIRED_THREADS) {
      uint32_t threads;
      memcpy(&threads, body, 4);
      f->threads = threads;
    }
    at = body + (at[0] == SIZED ? size : 0);
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  const Elf64_Ehdr* header = image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)((const char*)image + header->e_shoff);
  const char* names = (const char*)image + sections[header->e_shstrndx].sh_offset;
  const Device* device = &devices[current];
  if (function_count == FUNCTIONS) abort();
  begin("cuModuleLoadData");
  Function* f = &functions[function_count];
  *f = (Function){.device = current, .threads = 1024, .dynamic_shared = 48 << 10};
  for (int i = 0; i < header->e_shnum; i++) {
    const char* name = names + sections[i].sh_name;
    const uint8_t* body = (const uint8_t*)image + sections[i].sh_offset;
    if (!strncmp(name, ".text.", 6)) snprintf(f->name, sizeof f->name, "%s", name + 6);
    if (!strncmp(name, ".nv.info.", 9)) read_info(f, body, body + sections[i].sh_size);
    // from 9.0 on it counts the 1 KiB that the system takes of each block, which the opt-in limit leaves out
    if (!strncmp(name, ".nv.shared.", 11) && strcmp(name + 11, "reserved.0") && sections[i].sh_size > 1024)
      f->static_shared = sections[i].sh_size - 1024;
  }
  int abi = header->e_ident[EI_ABIVERSION];
  int target = (abi >= 8 ? header->e_flags >> 8 : header->e_flags) & 0xff;
  note(", \"kernel\": \"%s\", \"device\": %d, \"target\": %d, \"threads\": %d", f->name, current, target, f->threads);
  if (capturing) refuse("a stream is capturing");
  if (capturing) return answer(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  if (target / 10 != device->major || target % 10 > device->minor)
    refuse("compiled for %d, device is %d.%d", target, device->major, device->minor);
  if (!f->parameters) refuse("no parameters found in the binary");
  *module = (CUmodule)(intptr_t)++function_count;
  return answer(CUDA_ERROR_NO_BINARY_FOR_GPU);
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Function* f = &functions[(intptr_t)module - 1];
  if (strcmp(f->name, name)) return CUDA_ERROR_NOT_FOUND;
  return *function = (CUfunction)f, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  const Function* f = (const Function*)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? f->threads
           : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES   ? f->static_shared
                                                                : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  Function* f = (Function*)function;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_ERROR_INVALID_VALUE;  // oversized shared memory, which no device here has
  if (value < 0 || value + f->static_shared > devices[f->device].shared_optin) return CUDA_ERROR_INVALID_VALUE;
  return f->dynamic_shared = value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction function, const CUlaunchConfig* config) {
  return *clusters = 1, CUDA_SUCCESS;
}

// Launches.

static void note_parameter(const uint8_t* value, int size) {
  note("\"");
  for (int i = size - 1; i >= 0; i--) note("%02x", value[i]);
  note("\"");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
  const Function* f = (const Function*)function;
  const Device* d = &devices[f->device];
  unsigned long long threads = (unsigned long long)c->blockDimX * c->blockDimY * c->blockDimZ;
  begin("cuLaunchKernelEx");
  note(
      ", \"kernel\": \"%s\", \"device\": %d, \"grid\": [%u, %u, %u], "
      "\"threads\": %llu, \"shared\": %u, \"parameters\": [",
      f->name, f->device, c->gridDimX, c->gridDimY, c->gridDimZ, threads, c->sharedMemBytes);
  for (int i = 0; i < f->parameters; i++) {
    if (i) note(", ");
    note_parameter(parameters[i], f->size[i]);
  }
  note("]");
  if (f->device != current) refuse("the kernel was loaded on device %d, current is %d", f->device, current);
  if ((intptr_t)c->hStream != 16 + current) refuse("stream %p is not one of device %d", (void*)c->hStream, current);
  if (c->gridDimX < 1 || c->gridDimX > INT32_MAX) refuse("grid x is not 1 to 2^31 - 1");
  if (c->gridDimY < 1 || c->gridDimY > 65535) refuse("grid y is not 1 to 65535");
  if (c->gridDimZ < 1 || c->gridDimZ > 65535) refuse("grid z is not 1 to 65535");
  if (c->blockDimX < 1 || c->blockDimX > 1024 || c->blockDimY < 1 || c->blockDimY > 1024 || c->blockDimZ < 1 ||
      c->blockDimZ > 64 || threads > (unsigned)f->threads)
    refuse("a block of %llu threads, the kernel takes %d", threads, f->threads);
  if (c->sharedMemBytes > (unsigned)f->dynamic_shared)
    refuse("%u bytes of shared memory, opted in to %d", c->sharedMemBytes, f->dynamic_shared);
  if (c->sharedMemBytes + f->static_shared > (unsigned)d->shared_optin)
    refuse("%u bytes of shared memory, the device has %d", c->sharedMemBytes + f->static_shared, d->shared_optin);
  return answer(CUDA_ERROR_INVALID_VALUE);
}
