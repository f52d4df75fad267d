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
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "vectors_avx2.h"

#include "multiply.h"

#include "passes_body.h"

const rlrr::packed::Passes rlrr::packed::avx2_float32 = rlrr::passes_of<rlrr::Float32>;
const rlrr::packed::Passes rlrr::packed::avx2_bfloat16 = rlrr::passes_of<rlrr::WidenedBFloat16>;
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
