// The passes on the CPU. None of them holds the whole of W'.
//
// x [M, K] and dy [M, N] have one dtype T and any strides. W has the same dtype or, unless that is float64, float32 or
// bfloat16. u, v, the offset, du, dv and df are in Wide<T>. The columns of results are contiguous.
#pragma once

#include "types.h"

namespace rlrr {

enum class Pass { forward, grad_input, grad_scales };

// The memory for a call, and the number of threads that its size is for: torch's number can change meanwhile.
struct Scratch {
  void* data;
  int64_t bytes, threads;
};

struct Passes {
  // The scratch that a pass needs for this many threads; `rows` is x or dy.
  int64_t (*scratch_bytes)(Pass pass, const Matrix& rows, const Layer& layer, int64_t threads);
  // y = x W'^T + offset; offset [N], or null
  void (*forward)(const Matrix& x, const Layer& layer, const void* offset, const Matrix& y, const Scratch& scratch);
  // dx = dy W'
  void (*grad_input)(const Matrix& dy, const Layer& layer, const Matrix& dx, const Scratch& scratch);
  // du [N, rank], dv [groups, rank, K]
  void (*grad_scales)(const Matrix& dy, const Matrix& x, const Layer& layer, void* du, void* dv,
                      const Scratch& scratch);
};

// Through BLAS, on any CPU.
extern const Passes blas_passes;

// By own kernels, for an instruction set and a dtype of x and dy.
namespace packed {
extern const Passes avx2_float32, avx2_bfloat16;      // need avx2, fma
extern const Passes avx512_float32, avx512_bfloat16;  // need avx512f, bw, vl, dq
extern const Passes avx512_bfloat16_pairs;            // needs avx512_bf16 as well
extern const Passes amx_bfloat16;                     // needs amx_tile, amx_bf16 as well
}  // namespace packed

// Those for x or dy of this dtype on this CPU.
const Passes& passes_for(Dtype dtype);

// df [N] = dy summed over the tokens
void sum_tokens(const Matrix& dy, void* df);

// The highest instruction set in use: what the CPU has, or what RLRR_CPU_CAPABILITY limits it to.
const char* capability();

}  // namespace rlrr
