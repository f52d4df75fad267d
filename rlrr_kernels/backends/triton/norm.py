# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""LayerNorm with SSF's affine behind it: y = (xhat w + b) s + t, forward and backward, and their launch.

Letters: x is ``[M, D]``; w and b are the LayerNorm's own weight and bias (each may be
absent), s and t SSF's scale and shift, ``[D]`` each. A row is held in registers whole:
x is read once, and mean and variance take two passes over the registers. Both affines are
applied there in float32, so nothing is written between them.

The backward pass is LayerNorm's own with the weight w s; each program sums dy xhat and dy
over its rows, and a second kernel adds the programs' sums in their order, so that two runs
agree bit for bit. ds and dt follow from those two sums.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.choose import ceil_div
from rlrr_kernels.backends.triton.start import start
from rlrr_kernels.backends.triton.tiles import int64, narrow

#: Longest row that the backward kernel holds in registers: of any width, and of multiples of 16, which it loads
#: as vectors. Beyond, it would spill.
MAX_D, MAX_VECTOR_D = 4096, 8192
#: Elements of a program's tile: short rows share a program.
TILE = 2048
#: 8 elements a thread: backward then takes 80 registers, not 128 as with 16, and more warps hide its loads.
ELEMENTS_PER_WARP = 256
MAX_WARPS = 16
#: Warps that a multiprocessor holds at those 80 registers.
WARPS_PER_MULTIPROCESSOR = 24


@triton.jit
def load_vector(vector, cols, in_d):
    """These columns of a ``[D]`` as a float32 row."""
    return tl.load(vector + cols, mask=in_d, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["M"])
def forward_kernel(
    x,  # [M, D], columns next to each other
    weight,  # [D], read if HAS_WEIGHT
    bias,  # [D], read if HAS_BIAS
    scale,  # [D]
    shift,  # [D]
    y,  # [M, D], contiguous
    mean,  # [M]
    rstd,  # [M]
    M,
    D,
    eps,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS rows a program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    in_m, in_d = rows < M, cols < D
    inside = in_m[:, None] & in_d[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    ptrs = x + long_rows * stride_xm + cols[None, :]
    values = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(values, axis=1) / D
    # what lies beyond the row must not count in the variance
    centred = tl.where(in_d[None, :], values - mu[:, None], 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    # one vector at a time: composed first, w s and b s + t would both wait in registers
    out = centred * r[:, None]
    if HAS_WEIGHT:
        out *= load_vector(weight, cols, in_d)
    if HAS_BIAS:
        out += load_vector(bias, cols, in_d)
    out = out * load_vector(scale, cols, in_d) + load_vector(shift, cols, in_d)
    tl.store(y + long_rows * D + cols[None, :], narrow(out, y.dtype.element_ty, EMULATE_BF16), mask=inside)
    tl.store(mean + rows, mu, mask=in_m)
    tl.store(rstd + rows, r, mask=in_m)


@triton.jit(do_not_specialize=["M"])
def backward_kernel(
    dy,  # [M, D], columns next to each other
    x,  # [M, D], columns next to each other
    mean,  # [M]
    rstd,  # [M]
    weight,  # [D], read if HAS_WEIGHT
    scale,  # [D]
    dx,  # [M, D], contiguous, written if NEED_X
    partial,  # [2, programs, D]: sums of dy xhat, sums of dy
    M,
    D,
    stride_ym,
    stride_xm,
    HAS_WEIGHT: tl.constexpr,
    NEED_X: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx = r (g - mean(g) - xhat mean(g xhat)) with g = dy w s; each program takes every programs-th tile of rows."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    cols = tl.arange(0, BLOCK_D)
    in_d = cols < D
    if NEED_X:
        slope = load_vector(scale, cols, in_d)
        if HAS_WEIGHT:
            slope *= load_vector(weight, cols, in_d)
    dy_xhat = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dy_sum = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for tile in tl.range(pid, tl.cdiv(M, ROWS), programs):
        rows = tile * ROWS + tl.arange(0, ROWS)
        in_m = rows < M
        inside = in_m[:, None] & in_d[None, :]
        long_rows = rows.to(tl.int64)[:, None]
        values = tl.load(x + long_rows * stride_xm + cols[None, :], mask=inside, other=0.0)
        grad = tl.load(dy + long_rows * stride_ym + cols[None, :], mask=inside, other=0.0)
        mu = tl.load(mean + rows, mask=in_m, other=0.0)
        r = tl.load(rstd + rows, mask=in_m, other=0.0)
        # beyond the row xhat is not 0, but grad is, in all sums
        xhat = (values.to(tl.float32) - mu[:, None]) * r[:, None]
        grad = grad.to(tl.float32)
        dy_xhat += grad * xhat
        dy_sum += grad
        if NEED_X:
            g = grad * slope
            along = tl.sum(g * xhat, axis=1) / D
            level = tl.sum(g, axis=1) / D
            out = r[:, None] * (g - level[:, None] - xhat * along[:, None])
            tl.store(dx + long_rows * D + cols[None, :], narrow(out, dx.dtype.element_ty, EMULATE_BF16), mask=inside)
    tl.store(partial + int64(pid) * D + cols, tl.sum(dy_xhat, axis=0), mask=in_d)
    tl.store(partial + int64(programs + pid) * D + cols, tl.sum(dy_sum, axis=0), mask=in_d)


@triton.jit(do_not_specialize=["programs"])
def sum_partials_kernel(
    partial,  # [2, programs, D]
    weight,  # [D], read if HAS_WEIGHT
    bias,  # [D], read if HAS_BIAS
    ds,  # [D]
    dt,  # [D]
    programs,
    D,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ds = w sum(dy xhat) + b sum(dy) and dt = sum(dy), COLS columns a program, in a fixed order."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_d = cols < D
    dy_xhat = tl.zeros((ROWS, COLS), tl.float32)
    dy_sum = tl.zeros((ROWS, COLS), tl.float32)
    for first in tl.range(0, programs, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        inside = (rows < programs) & in_d[None, :]
        ptrs = partial + rows.to(tl.int64) * D + cols[None, :]
        dy_xhat += tl.load(ptrs, mask=inside, other=0.0)
        dy_sum += tl.load(ptrs + int64(programs) * D, mask=inside, other=0.0)
    scale_grad = tl.sum(dy_xhat, axis=0)
    shift_grad = tl.sum(dy_sum, axis=0)
    if HAS_WEIGHT:
        scale_grad *= tl.load(weight + cols, mask=in_d, other=0.0).to(tl.float32)
    if HAS_BIAS:
        scale_grad += shift_grad * tl.load(bias + cols, mask=in_d, other=0.0).to(tl.float32)
    tl.store(ds + cols, scale_grad, mask=in_d)
    tl.store(dt + cols, shift_grad, mask=in_d)


def unsupported_layer_norm(x: Tensor) -> str | None:
    """Why the kernels cannot serve x ``[..., D]``, or None if they can."""
    d = x.shape[-1]
    if d > (MAX_D if d % 16 else MAX_VECTOR_D):
        return f"rows of {d} elements: it holds a row in registers, {MAX_D}, or {MAX_VECTOR_D} in multiples of 16"
    return launch.unsupported(x, x)


class Tile(NamedTuple):
    """Rows of a program, columns rounded up to a power of two, warps."""

    rows: int
    block_d: int
    warps: int


@functools.cache
def _tile(d: int) -> Tile:
    block = triton.next_power_of_2(d)
    rows = max(1, TILE // block)
    return Tile(rows, block, min(MAX_WARPS, rows * block // ELEMENTS_PER_WARP))


def _programs(x: Tensor, tile: Tile) -> int:
    """As many as the GPU holds at once, since each leaves a row of partial sums; fewer where there are fewer rows."""
    resident = launch.device_of(x).multiprocessors * max(1, WARPS_PER_MULTIPROCESSOR // tile.warps)
    return min(resident, ceil_div(x.shape[0], tile.rows))


def _vector(t: Tensor | None, absent: Tensor) -> Tensor:
    """A contiguous ``[D]`` of 32 bits at most; for an absent one any pointer will do."""
    if t is None:
        return absent
    return (t.float() if t.dtype is torch.float64 else t).contiguous()


def _rows(t: Tensor) -> Tensor:
    """Columns next to each other, as PyTorch's LayerNorm wants them too; rows may lie apart."""
    return t if t.stride(1) == 1 else t.contiguous()


def _emulate(t: Tensor) -> bool:
    return launch.interpreting() and t.dtype is torch.bfloat16


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y ``[M, D]`` in ``dtype``, mean and 1 / standard deviation ``[M, 1]`` in float32, of x ``[M, D]``."""
    x = _rows(x)
    m, d = x.shape
    y = torch.empty((m, d), dtype=dtype, device=x.device)
    mean, rstd = (torch.empty((m, 1), dtype=torch.float32, device=x.device) for _ in range(2))
    scale = _vector(scale, scale)
    tile = _tile(d)
    with launch.guard(x):
        start(
            forward_kernel,
            (ceil_div(m, tile.rows),),
            (x, _vector(weight, scale), _vector(bias, scale), scale, _vector(shift, scale), y, mean, rstd),
            (m,),
            (d, eps, x.stride(0)),
            {
                "HAS_WEIGHT": weight is not None,
                "HAS_BIAS": bias is not None,
                "EMULATE_BF16": _emulate(y),
                "ROWS": tile.rows,
                "BLOCK_D": tile.block_d,
            },
            {"num_warps": tile.warps, "enable_fp_fusion": True},
            x.device.index,
        )
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    need_x: bool,
    *,
    programs: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx ``[M, D]`` in x's dtype (``[0, D]`` unless asked for), ds and dt ``[D]`` in float32.

    ``programs``: how many share the rows; as many as the GPU holds, if not given.
    """
    dy, x = _rows(dy), _rows(x)
    m, d = x.shape
    tile = _tile(d)
    if programs is None:
        programs = _programs(x, tile)
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty((m if need_x else 0, d), dtype=x.dtype, device=x.device)
    partial = torch.empty((2, programs, d), **new)
    ds, dt = torch.empty(d, **new), torch.empty(d, **new)
    scale = _vector(scale, scale)
    weight_or_any = _vector(weight, scale)
    cols = 32
    with launch.guard(x):
        start(
            backward_kernel,
            (programs,),
            (dy, x, mean, rstd, weight_or_any, scale, dx, partial),
            (m,),
            (d, dy.stride(0), x.stride(0)),
            {
                "HAS_WEIGHT": weight is not None,
                "NEED_X": need_x,
                "EMULATE_BF16": _emulate(dx),
                "ROWS": tile.rows,
                "BLOCK_D": tile.block_d,
            },
            {"num_warps": tile.warps, "enable_fp_fusion": True},
            x.device.index,
        )
        start(
            sum_partials_kernel,
            (ceil_div(d, cols),),
            (partial, weight_or_any, _vector(bias, scale), ds, dt),
            (programs,),
            (d,),
            {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "ROWS": 32, "COLS": cols},
            {"num_warps": 4, "enable_fp_fusion": True},
            x.device.index,
        )
    return dx, ds, dt
