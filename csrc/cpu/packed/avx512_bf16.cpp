#if defined(__x86_64__)
// standard headers first: what follows is compiled for other instructions, and they are shared with files that are not
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

#include "../runtime.h"
#include "passes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#define RLRR_BFLOAT16_PAIRS
#include "vectors_avx512.h"

#include "multiply.h"

#include "passes_body.h"

const rlrr::packed::Passes rlrr::packed::avx512_bfloat16_pairs = rlrr::passes_of<rlrr::BFloat16Pair>;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
