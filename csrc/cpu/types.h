// Element types, matrices and the frozen layer as the CPU kernels know them, with no torch type.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace rlrr {

struct bfloat16 {
  uint16_t bits;
};

inline float widen(bfloat16 value) {
  uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

template <class T>
T narrow(decltype(widen(T{})) value) {
  return value;
}

template <>
inline bfloat16 narrow<bfloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  // to nearest, ties to even; a NaN gets its quiet bit set, as rounding could make it an infinity
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40)};
}

// float64 sums in float64, all narrower types in float32
template <class T>
using Wide = decltype(widen(T{}));

enum class Dtype { float32, bfloat16, float64 };

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }
inline int64_t wide_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

template <class T>
constexpr Dtype dtype_of = sizeof(T) == 8   ? Dtype::float64
                           : sizeof(T) == 4 ? Dtype::float32
                                            : Dtype::bfloat16;

// Strides are in elements and can have any value, 0 included.
struct Matrix {
  void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  Dtype dtype;

  template <class T>
  T* at(int64_t row, int64_t col) const {
    return static_cast<T*>(data) + row * row_stride + col * col_stride;
  }
  Matrix transposed() const { return {data, cols, rows, col_stride, row_stride, dtype}; }
  Matrix block(int64_t row, int64_t row_count, int64_t col, int64_t col_count) const {
    char* start = static_cast<char*>(data) + (row * row_stride + col * col_stride) * element_size(dtype);
    return {start, row_count, col_count, row_stride, col_stride, dtype};
  }
};

// W with its scales u [N, rank] and v [groups, rank, K], contiguous, in the type of the sums.
struct Layer {
  Matrix weight;
  const void* u;
  const void* v;
  int64_t groups, rank;

  int64_t n() const { return weight.rows; }
  int64_t k() const { return weight.cols; }
  int64_t group_of(int64_t row) const { return row / (weight.rows / groups); }
};

// Returns parts of rows as contiguous memory: the memory of the matrix, or a copy if its columns are not adjacent.
template <class T>
class ContiguousRow {
 public:
  explicit ContiguousRow(const Matrix& matrix) : matrix_(matrix) {
    if (matrix.col_stride != 1) copy_.resize(matrix.cols);
  }

  const T* operator()(int64_t row, int64_t col, int64_t count) {
    const T* start = matrix_.at<T>(row, col);
    if (matrix_.col_stride == 1) return start;
    for (int64_t i = 0; i < count; ++i) copy_[i] = start[i * matrix_.col_stride];
    return copy_.data();
  }

 private:
  const Matrix& matrix_;
  std::vector<T> copy_;
};

// Calls body(T{}, W{}) with the types for the dtypes of x and W, which must be a supported pair.
template <class F>
void dispatch(Dtype x, Dtype weight, const F& body) {
  if (x == Dtype::float64) {
    body(double{}, double{});
  } else if (x == Dtype::float32) {
    weight == Dtype::float32 ? body(float{}, float{}) : body(float{}, bfloat16{});
  } else {
    weight == Dtype::float32 ? body(bfloat16{}, float{}) : body(bfloat16{}, bfloat16{});
  }
}

}  // namespace rlrr
