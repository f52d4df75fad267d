// The loops, for the instruction set of RLRR_TARGET; the table of them is in the namespace RLRR_ISA. loops.cpp defines
// both macros and includes this file once for each instruction set.

namespace rlrr::RLRR_ISA {
namespace {

template <class T, class W>
RLRR_TARGET void rescale(const W* __restrict w, Wide<T> u, const Wide<T>* __restrict v, int64_t count,
                         T* __restrict out) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) out[k] = narrow<T>(widen(w[k]) * (1 + u * v[k]));
}

template <class A, class W>
RLRR_TARGET A reduce(const A* __restrict g, const W* __restrict w, A u, const A* __restrict v, int64_t count,
                     A* __restrict dv) {
  A du = 0;
#pragma omp simd reduction(+ : du)
  for (int64_t k = 0; k < count; ++k) {
    const A p = g[k] * widen(w[k]);
    du += p * v[k];
    dv[k] += u * p;
  }
  return du;
}

template <class A, class W>
RLRR_TARGET void multiply(const W* __restrict w, int64_t count, A* __restrict g) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) g[k] *= widen(w[k]);
}

template <class T>
RLRR_TARGET void add(const T* __restrict row, int64_t count, Wide<T>* __restrict total) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) total[k] += widen(row[k]);
}

}  // namespace

const Loops table = {
    rescale<float, float>,
    rescale<float, bfloat16>,
    rescale<bfloat16, bfloat16>,
    rescale<bfloat16, float>,
    rescale<double, double>,
    reduce<float, float>,
    reduce<float, bfloat16>,
    reduce<double, double>,
    multiply<float, float>,
    multiply<float, bfloat16>,
    multiply<double, double>,
    add<float>,
    add<bfloat16>,
    add<double>,
};

}  // namespace rlrr::RLRR_ISA

#undef RLRR_ISA
#undef RLRR_TARGET
