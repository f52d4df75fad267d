// The passes for AVX-512 with products of bfloat16.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../passes.h"
#include "../runtime.h"

// The headers above are compiled for any x86-64, since other files share their inline functions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#define RLRR_AVX512
#define RLRR_BFLOAT16_PAIRS
#include "kernels.h"

const rlrr::Passes rlrr::packed::avx512_bfloat16_pairs = rlrr::passes_of<rlrr::BFloat16Pair>;

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
