#include "tensor_map.h"

#include <array>
#include <limits>

namespace rlrr::hopper {
namespace {

// The function of the driver, found through the runtime, so that the library links without the driver.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    if (!usable) static_cast<void>(cudaGetLastError());
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(usable ? function : nullptr);
  }();
  return encode;
}

// What a tensor map is made from, besides what the type determines.
struct Key {
  CUtensorMapDataType type;
  void* data;
  int64_t rows, cols, row_bytes;
  int box_rows;

  bool operator==(const Key& k) const {
    return data == k.data && rows == k.rows && cols == k.cols && row_bytes == k.row_bytes && box_rows == k.box_rows &&
           type == k.type;
  }
  size_t hash() const {
    uint64_t sum = reinterpret_cast<uintptr_t>(data) >> 4;
    for (const int64_t part : {rows, cols, row_bytes, int64_t{box_rows}}) sum = sum * 0x9e3779b97f4a7c15u + part;
    return static_cast<size_t>(sum * 0x9e3779b97f4a7c15u >> 32);
  }
};

// A cache of tensor maps for one thread. Each step of a training meets the same weights and, through the allocator of
// torch, mostly the same addresses: for the 48 linear layers of a ViT-B some 140 keys on the thread of forward and 200
// on that of autograd, for a ViT-L twice as many. A map depends on its key alone, so that it stays valid for an address
// that has been freed and allocated again.
class Recent {
 public:
  struct Entry {
    Key key;
    CUtensorMap map;
  };

  const Entry* find(const Key& key) const {
    for (const Entry& entry : sets_[key.hash() % kSets].ways)
      if (entry.key == key) return &entry;
    return nullptr;
  }
  void keep(const Key& key, const CUtensorMap& map) {
    Set& set = sets_[key.hash() % kSets];
    set.ways[set.oldest++ % kWays] = {key, map};
  }

 private:
  static constexpr int kSets = 256, kWays = 4;
  struct Set {
    std::array<Entry, kWays> ways;  // empty if data is null
    unsigned oldest;
  };
  std::array<Set, kSets> sets_ = {};
};
thread_local Recent recent;

cudaError_t encode(CUtensorMap& map, const Key& key) {
  if (!encoder()) return cudaErrorNotSupported;
  if (const Recent::Entry* known = recent.find(key)) {
    map = known->map;
    return cudaSuccess;
  }
  const auto& [type, data, rows, cols, row_bytes, box_rows] = key;
  const auto swizzle =
      type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[] = {1, 1};
  const CUresult result = encoder()(&map, type, 2, data, size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;
  recent.keep(key, map);
  return cudaSuccess;
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

bool fits_boxes(const Matrix& matrix, int64_t rows, int64_t cols) {
  // coordinates are 32-bit, and boxes can begin up to a tile beyond the edge
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() - 1024;
  return matrix.dtype != Dtype::float32 && matrix.col_stride == 1 && matrix.row_stride >= cols &&
         matrix.row_stride % 8 == 0 && matrix.row_stride * 2 < int64_t{1} << 40 && aligned(matrix.data) && rows > 0 &&
         cols > 0 && rows < kLargest && cols < kLargest;
}

bool fits_layer(const Layer& layer, Dtype dtype) {
  return layer.device.capability == 90 && layer.weight.dtype == dtype && fits_boxes(layer.weight, layer.n, layer.k) &&
         layer.n % 8 == 0 && layer.k % 8 == 0 && aligned(layer.u) && aligned(layer.v) && layer.groups > 0 &&
         layer.n % layer.groups == 0 && encoder() != nullptr;
}

cudaError_t describe(CUtensorMap& map, const Matrix& matrix, int64_t rows, int64_t cols, int box_rows) {
  const auto type = matrix.dtype == Dtype::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(map, {type, matrix.data, rows, cols, matrix.row_stride * 2, box_rows});
}

cudaError_t describe(CUtensorMap& map, const float* rows_of_scales, int64_t rows, int64_t cols) {
  return encode(map, {CU_TENSOR_MAP_DATA_TYPE_FLOAT32, const_cast<float*>(rows_of_scales), rows, cols, cols * 4, 1});
}

}  // namespace rlrr::hopper
