// The loops over rows, compiled for three instruction sets: each inclusion of loops_body.h defines a table.
#include "loops.h"

#define RLRR_ISA baseline
#define RLRR_TARGET
#include "loops_body.h"

#if defined(__x86_64__)
#define RLRR_ISA avx2
#define RLRR_TARGET __attribute__((target("avx2,fma,f16c")))
#include "loops_body.h"

#define RLRR_ISA avx512
#if defined(__clang__)
#define RLRR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define RLRR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#endif
#include "loops_body.h"
#endif
