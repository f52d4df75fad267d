#include "loops.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define RLRR_ISA avx512
#define RLRR_ISA_NAME "avx512"
#include "loops_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
