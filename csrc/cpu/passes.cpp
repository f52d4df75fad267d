#include "passes.h"

#include "blas/passes.h"
#include "loops.h"
#include "packed/passes.h"

namespace rlrr {

namespace {

// The kernels of our own for this CPU, pass and operand (x or dy), or null where BLAS serves
const packed::Passes* own_kernels([[maybe_unused]] Pass pass, [[maybe_unused]] const Matrix& rows) {
  [[maybe_unused]] const Dtype dtype = rows.dtype;
#if defined(__x86_64__)
  if (dtype == Dtype::float32 && has_avx2()) return has_avx512() ? &packed::avx512_float32 : &packed::avx2_float32;
  if (dtype == Dtype::bfloat16 && has_avx2()) {
    if (has_amx()) return &packed::amx_bfloat16;
    if (has_avx512_bf16()) return &packed::avx512_bfloat16_pairs;
    return has_avx512() ? &packed::avx512_bfloat16 : &packed::avx2_bfloat16;
  }
#endif
  return nullptr;
}

}  // namespace

int64_t scratch_bytes(Pass pass, const Matrix& rows, const Layer& layer, int64_t threads) {
  const auto* own = own_kernels(pass, rows);
  return own ? own->scratch_bytes(pass, rows, layer, threads) : blas::scratch_bytes(rows, layer);
}

void forward(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch) {
  const auto* own = own_kernels(Pass::forward, x);
  (own ? own->forward : blas::forward)(x, layer, offset, y, scratch);
}

void grad_input(const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch) {
  const auto* own = own_kernels(Pass::grad_input, dy);
  (own ? own->grad_input : blas::grad_input)(dy, layer, dx, scratch);
}

void grad_scales(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv, const Scratch& scratch) {
  const auto* own = own_kernels(Pass::grad_scales, x);
  (own ? own->grad_scales : blas::grad_scales)(dy, x, layer, du, dv, scratch);
}

}  // namespace rlrr
