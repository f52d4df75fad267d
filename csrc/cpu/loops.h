// Loops over rows for the passes through BLAS and for df, each compiled for several instruction sets.
#pragma once

#include "types.h"

namespace rlrr {

// out[k] = w[k] * (1 + u v[k]), computed in Wide<T> and rounded once
template <class T, class W>
using RescaleRow = void(const W* w, Wide<T> u, const Wide<T>* v, int64_t count, T* out);

// with p[k] = g[k] w[k]:  dv[k] += u p[k];  returns the sum of p[k] v[k]
template <class A, class W>
using ReduceRow = A(const A* g, const W* w, A u, const A* v, int64_t count, A* dv);

// g[k] *= w[k]
template <class A, class W>
using MultiplyRow = void(const W* w, int64_t count, A* g);

// total[k] += row[k]
template <class T>
using AddRow = void(const T* row, int64_t count, Wide<T>* total);

struct Loops {
  RescaleRow<float, float>* rescale_f32_f32;
  RescaleRow<float, bfloat16>* rescale_f32_bf16;
  RescaleRow<bfloat16, bfloat16>* rescale_bf16_bf16;
  RescaleRow<bfloat16, float>* rescale_bf16_f32;
  RescaleRow<double, double>* rescale_f64_f64;
  ReduceRow<float, float>* reduce_f32_f32;
  ReduceRow<float, bfloat16>* reduce_f32_bf16;
  ReduceRow<double, double>* reduce_f64_f64;
  MultiplyRow<float, float>* multiply_f32_f32;
  MultiplyRow<float, bfloat16>* multiply_f32_bf16;
  MultiplyRow<double, double>* multiply_f64_f64;
  AddRow<float>* add_f32;
  AddRow<bfloat16>* add_bf16;
  AddRow<double>* add_f64;
};

namespace baseline {
extern const Loops table;
}
namespace avx2 {
extern const Loops table;
}
namespace avx512 {
extern const Loops table;
}

// The loops for this CPU.
const Loops& loops();

inline auto rescale_row(float, float) { return loops().rescale_f32_f32; }
inline auto rescale_row(float, bfloat16) { return loops().rescale_f32_bf16; }
inline auto rescale_row(bfloat16, bfloat16) { return loops().rescale_bf16_bf16; }
inline auto rescale_row(bfloat16, float) { return loops().rescale_bf16_f32; }
inline auto rescale_row(double, double) { return loops().rescale_f64_f64; }
inline auto reduce_row(float, float) { return loops().reduce_f32_f32; }
inline auto reduce_row(float, bfloat16) { return loops().reduce_f32_bf16; }
inline auto reduce_row(double, double) { return loops().reduce_f64_f64; }
inline auto multiply_row(float, float) { return loops().multiply_f32_f32; }
inline auto multiply_row(float, bfloat16) { return loops().multiply_f32_bf16; }
inline auto multiply_row(double, double) { return loops().multiply_f64_f64; }
inline auto add_row(float) { return loops().add_f32; }
inline auto add_row(bfloat16) { return loops().add_bf16; }
inline auto add_row(double) { return loops().add_f64; }

}  // namespace rlrr
