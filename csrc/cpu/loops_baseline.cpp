#include "loops.h"

#define RLRR_ISA baseline
#define RLRR_ISA_NAME "baseline"
#include "loops_body.h"
