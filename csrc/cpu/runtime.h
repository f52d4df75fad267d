// What the CPU kernels ask of PyTorch: its threads and its matrix product.
#pragma once

#include "types.h"

namespace rlrr {

// Run body(begin, end) over parts of [begin, end) on torch's threads. The body must not throw.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  auto call = [](int64_t b, int64_t e, void* f) { (*static_cast<const F*>(f))(b, e); };
  parallel_for(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

int64_t thread_count();

// out = a b, by the BLAS that torch uses.
void matmul(const Matrix& a, const Matrix& b, const Matrix& out);

// out = x w^T + offset; offset [cols of out], in out's type, or null.
void linear(const Matrix& x, const Matrix& w, const void* offset, const Matrix& out);

}  // namespace rlrr
