// The passes for AVX-512 F, BW, VL and DQ.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../passes.h"
#include "../runtime.h"

// The headers above are compiled for any x86-64, since other files share their inline functions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define RLRR_AVX512
#include "kernels.h"

const rlrr::Passes rlrr::packed::avx512_float32 = rlrr::passes_of<rlrr::Float32>;
const rlrr::Passes rlrr::packed::avx512_bfloat16 = rlrr::passes_of<rlrr::WidenedBFloat16>;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
