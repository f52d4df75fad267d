"""The second pass of a product whose depth was split: add the partial sums, in one order."""

import triton
import triton.language as tl

from rlrr_kernels.backends.triton.tiles import int64, narrow


@triton.jit(do_not_specialize=["M", "splits"])
def sum_splits_kernel(
    partial,  # [splits, M, N] float32
    bias,  # [N], read if HAS_BIAS
    shift,  # [N], read if HAS_SHIFT
    out,  # [M, N], contiguous
    M,
    splits,
    N,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out = sum of the partials (+ bias + shift), rounded once: two runs agree bit for bit."""
    col_blocks = tl.cdiv(N, COLS)
    rows = (tl.program_id(0) // col_blocks) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = (tl.program_id(0) % col_blocks) * COLS + tl.arange(0, COLS)[None, :]
    inside = (rows < M) & (cols < N)
    offsets = rows.to(tl.int64) * N + cols
    total = tl.zeros((ROWS, COLS), tl.float32)
    for split in tl.range(0, splits):
        total += tl.load(partial + int64(split) * M * N + offsets, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        total += tl.load(shift + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(out + offsets, narrow(total, out.dtype.element_ty, EMULATE_BF16), mask=inside)
