"""U and V of a larger rank, cut into parts that 16-bit matrix units multiply to float32's precision.

A float32 number is the sum of three of bfloat16, which has its exponents: each part is what the earlier ones leave, to
the nearest. Six of the nine products of parts exceed float32's rounding (:func:`tiles.scale`), and every product of two
parts is exact in float32. The parts come from memory, as an operand that a kernel computes in registers costs more than
the product, and is not safe on Hopper (``tests/hazards.py``).
"""

import triton
import triton.language as tl

from rlrr_kernels.backends.triton.tiles import int64, load_float, narrow, padded


@triton.jit
def cut(source, out, index, rows, cols, width, RANK: tl.constexpr, PARTS: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """Cut source ``[rows, RANK, cols]`` into out ``[rows, PARTS, padded rank, width]``, elements ``index`` of each."""
    depth: tl.constexpr = padded(RANK, PARTS)
    row, j, col = index // (depth * width), index // width % depth, index % width
    rest = load_float(source + (row * RANK + j) * cols + col, (row < rows) & (j < RANK) & (col < cols))
    for part in tl.static_range(PARTS):
        value = narrow(rest, tl.bfloat16, EMULATE_BF16)
        at = ((row * PARTS + part) * depth + j) * width + col
        tl.store(out + at, value.to(out.dtype.element_ty), mask=row < rows)
        # an infinity leaves nothing: infinity less infinity is NaN
        rest = tl.where(tl.abs(rest) < float("inf"), rest - value.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["N", "K", "groups", "width"])
def cut_kernel(
    u,  # [N, RANK]
    v,  # [groups, RANK, K]
    u_parts,  # [N, PARTS, padded rank]
    v_parts,  # [groups, PARTS, padded rank, width]: K and zeros
    N,
    K,
    groups,
    width,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut U and V in one launch."""
    u_programs = tl.cdiv(N * padded(RANK, PARTS), BLOCK)
    if tl.program_id(0) < u_programs:
        index = int64(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
        cut(u, u_parts, index, N, 1, 1, RANK, PARTS, EMULATE_BF16)
    else:
        index = int64(tl.program_id(0) - u_programs) * BLOCK + tl.arange(0, BLOCK)
        cut(v, v_parts, index, groups, K, width, RANK, PARTS, EMULATE_BF16)
