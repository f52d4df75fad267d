#include "passes.h"

#include <algorithm>

#include "avx512/passes.h"
#include "blas/passes.h"
#include "loops.h"
#include "runtime.h"

namespace rlrr {

namespace {

// The kernels of our own for this CPU, type and length of sum, or null where BLAS serves
const avx512::Passes* own_kernels([[maybe_unused]] Dtype dtype, [[maybe_unused]] int64_t length) {
#if defined(__x86_64__)
  if (dtype == Dtype::float64 || !avx512::fits_cache(dtype, length)) return nullptr;
  if (dtype == Dtype::float32 && has_avx512()) return &avx512::float32_passes;
  // where there are AMX tiles, only BLAS uses them
  if (dtype == Dtype::bfloat16 && has_avx512_bf16() && !has_amx()) return &avx512::bfloat16_passes;
#endif
  return nullptr;
}

// The sum of grad_scales runs over tokens, in blocks, so that it always fits
int64_t sum_length(Pass pass, const Layer& layer) {
  return pass == Pass::forward ? layer.k() : pass == Pass::grad_input ? layer.n() : 0;
}

}  // namespace

int64_t scratch_bytes(Pass pass, const Matrix& rows, const Layer& layer) {
  const int64_t length = sum_length(pass, layer);
  if (own_kernels(rows.dtype, length) == nullptr) return blas::scratch_bytes(rows, layer);
  if (pass == Pass::grad_scales) return avx512::gram_scratch_bytes(rows, layer);
  return avx512::scratch_bytes(rows.dtype, length, thread_count());
}

void forward(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, void* scratch, int64_t bytes) {
  if (const auto* own = own_kernels(x.dtype, sum_length(Pass::forward, layer))) {
    own->forward(x, layer, static_cast<const float*>(offset), y, scratch, thread_count());
  } else {
    blas::forward(x, layer, offset, y, scratch, bytes);
  }
}

void grad_input(const Matrix& dy, const Layer& layer, const Matrix& dx, void* scratch, int64_t bytes) {
  if (const auto* own = own_kernels(dy.dtype, sum_length(Pass::grad_input, layer))) {
    own->grad_input(dy, layer, dx, scratch, thread_count());
  } else {
    blas::grad_input(dy, layer, dx, scratch, bytes);
  }
}

void grad_scales(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, void* scratch,
                 int64_t bytes) {
  std::fill_n(static_cast<char*>(du), layer.n() * wide_size(x.dtype), 0);
  std::fill_n(static_cast<char*>(dv), layer.groups * layer.k() * wide_size(x.dtype), 0);
  if (const auto* own = own_kernels(x.dtype, sum_length(Pass::grad_scales, layer))) {
    own->grad_scales(dy, x, layer, static_cast<float*>(du), static_cast<float*>(dv), scratch, bytes);
  } else {
    blas::grad_scales(dy, x, layer, du, dv, scratch, bytes);
  }
}

}  // namespace rlrr
