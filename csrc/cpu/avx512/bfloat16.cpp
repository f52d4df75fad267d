#if defined(__x86_64__)
// standard headers first: what follows is compiled for AVX-512, and they are shared with files that are not
#include <algorithm>
#include <cstring>

#include <immintrin.h>

#include "../runtime.h"
#include "passes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#define RLRR_AVX512_BF16
#include "passes_body.h"

const rlrr::avx512::Passes rlrr::avx512::bfloat16_passes = rlrr::passes_of<rlrr::BFloat16>;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
