// The passes for AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../passes.h"
#include "../runtime.h"

// The headers above are compiled for any x86-64, since other files share their inline functions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "kernels.h"

const rlrr::Passes rlrr::packed::avx2_float32 = rlrr::passes_of<rlrr::Float32>;
const rlrr::Passes rlrr::packed::avx2_bfloat16 = rlrr::passes_of<rlrr::WidenedBFloat16>;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
