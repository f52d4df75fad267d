#include "loops.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define RLRR_ISA avx2
#define RLRR_ISA_NAME "avx2"
#include "loops_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
