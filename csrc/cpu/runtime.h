// What the CPU kernels use of PyTorch: its threads and its matrix product. register.cpp implements it.
#pragma once

#include <algorithm>
#include <atomic>

#include "types.h"

namespace rlrr {

// Runs body(begin, end) for parts of [begin, end) on the threads of torch. The body must not throw.
void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& body) {
  auto call = [](int64_t b, int64_t e, void* f) { (*static_cast<const F*>(f))(b, e); };
  parallel_for(begin, end, grain, call, const_cast<void*>(static_cast<const void*>(&body)));
}

int64_t thread_count();

// The number of threads, at most `threads`, that this many multiply-adds are worth: to wake a thread and wait for it
// takes as long as thousands of them and, on a busy machine, as long as millions.
inline int64_t useful_threads(int64_t multiply_adds, int64_t threads) {
  return std::clamp<int64_t>(multiply_adds >> 21, 1, threads);
}

// Runs body(task, worker) for each task, in one parallel region of at most `workers` threads. They take tasks one by
// one, so that a thread that other processes delay takes fewer.
template <class F>
void share(int64_t tasks, int64_t workers, const F& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(workers, tasks), 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < tasks; task = next++) body(task, worker);
    }
  });
}

// out = a b, by the BLAS of torch.
void matmul(const Matrix& a, const Matrix& b, const Matrix& out);

// out = x w^T + offset; offset [columns of out] in the dtype of out, or null.
void linear(const Matrix& x, const Matrix& w, const void* offset, const Matrix& out);

}  // namespace rlrr
