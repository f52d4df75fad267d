"""Hopper's kernels as the backend ``gluon``: chooses tiles for the given tensors, and launches the kernels.

They support float16 and bfloat16, with W in x's dtype, where the copy engine can load boxes: rows of a multiple of 16
bytes, and groups of whole tiles of 128 rows. Other tensors, and problems with too few tiles for the multiprocessors,
go to the plain kernels of :mod:`rlrr_kernels.backends.triton.launch`, which split sums.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rlrr_kernels.backends import tuned
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.triton import launch as plain
from rlrr_kernels.backends.triton.choose import WORKSPACE_BYTES, Device, ceil_div, row_slices
from rlrr_kernels.backends.triton.gluon.gram import gram_kernel
from rlrr_kernels.backends.triton.gluon.product import product_kernel
from rlrr_kernels.backends.triton.start import start

#: Rows of W' in a tile, and steps of its depth.
ROWS, DEPTH = 128, 64


@dataclass(frozen=True)
class Width:
    """Tokens of a tile: ``wide`` in one product and ``extra`` (0 or 64) in a second; ``stages`` fit in shared memory.

    Triton's shapes are powers of two, so 192 tokens are 128 and 64. Their step costs what 192 tokens cost.
    """

    wide: int
    extra: int
    stages: int

    @property
    def tokens(self) -> int:
        return self.wide + self.extra


WIDTHS = (Width(256, 0, 3), Width(128, 64, 4), Width(128, 0, 5))

#: A tile of grad_scales: tokens of a step, rows and columns of G, steps in flight.
TOKENS, GRAM_ROWS, GRAM_COLUMNS, GRAM_STAGES = 64, 128, 256, 4

#: What a tile costs besides its products, in tokens of a product, and in steps of grad_scales.
_TILE_TOKENS, _TILE_STEPS = 8, 10


def multiprocessors(x: Tensor) -> int:
    """Return the number of multiprocessors of x's GPU."""
    return plain.device_of(x).multiprocessors


def unsupported(x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """Return why this backend cannot serve these tensors at this rank, or None if it can."""
    if rank != 1:
        return f"rank {rank}: it computes rank 1"
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype is not x.dtype:
        return f"x {x.dtype} with weight {weight.dtype}: it computes in float16 and bfloat16, with a weight of the same"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"device {x.device}: it runs on NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(x.device)
    return None if capability[0] == 9 else f"compute capability {capability}: it needs 9.x"


@lru_cache(maxsize=4096)
def widths(m: int, rows: int, multiprocessors: int) -> tuple[Width, ...]:
    """Return the widths of tiles for a result ``[m, rows]``, the one whose waves cost the least first.

    Empty if there are too few tiles for the multiprocessors.
    """

    def cost(w: Width) -> int:
        return ceil_div(ceil_div(m, w.tokens) * ceil_div(rows, ROWS), multiprocessors) * (w.tokens + _TILE_TOKENS)

    if 2 * ceil_div(m, WIDTHS[-1].tokens) * ceil_div(rows, ROWS) < multiprocessors:
        return ()
    return tuple(sorted(WIDTHS, key=cost))


def candidates(problem: Problem, device: Device) -> tuple[Width | None, ...]:
    """Return what ``rlrr-tune`` measures, the cost model's choice first.

    ``(None,)`` for grad_scales, which has one tile only, and for problems that go to the plain kernels.
    """
    if problem.kernel == "grad_scales":
        return (None,)
    rows = problem.n if problem.kernel == "forward" else problem.k
    return widths(problem.m, rows, device.multiprocessors) or (None,)


def _chosen(problem: Problem, act: Tensor) -> Width | None:
    """Return what was measured for a product, else the cost model's choice; None if there are too few tiles."""
    rows = problem.n if problem.kernel == "forward" else problem.k
    fitting = widths(problem.m, rows, multiprocessors(act))
    entry = tuned.find(problem, act.device)
    if entry is not None and entry.backend == "gluon" and entry.tile is not None:
        fitting = (*(w for w in fitting if asdict(w) == entry.tile), *fitting)
    return fitting[0] if fitting else None


@lru_cache(maxsize=4096)
def split_tokens(m: int, n: int, k: int, multiprocessors: int) -> int:
    """Return the number of tokens that a program of grad_scales sums over, so that its waves take the fewest steps."""
    steps, k_tiles = ceil_div(m, TOKENS), ceil_div(k, GRAM_COLUMNS)
    tiles = ceil_div(n, GRAM_ROWS) * k_tiles
    most = min(steps, max(1, WORKSPACE_BYTES // _partial_bytes(n, k)), max(1, 3 * multiprocessors // tiles))
    shares = {ceil_div(steps, splits) for splits in range(1, most + 1)}

    def cost(share: int) -> int:
        return ceil_div(tiles * ceil_div(steps, share), multiprocessors) * (share + _TILE_STEPS)

    return TOKENS * min(sorted(shares, reverse=True), key=cost)


def _partial_bytes(n: int, k: int) -> int:
    """Return the bytes of one split's partial sums: du and df from each tile of K, dv from each 64 rows."""
    return 4 * (2 * n * ceil_div(k, GRAM_COLUMNS) + ceil_div(n, 64) * k)


def _fits(*tensors: Tensor) -> bool:
    """Return whether the copy engine can load boxes of these matrices.

    They must be row-major, and begin and have rows at multiples of 16 bytes.
    """
    return all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def _aligned(t: Tensor) -> Tensor:
    """Return vectors where boxes can begin, copied if they must be: a view of a flat parameter may begin anywhere."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _whole_groups(n: int, groups: int) -> bool:
    return groups == 1 or n // groups % ROWS == 0


_HALF = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_FLOAT_ROW = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def _boxes(t: Tensor, rows: int, cols: int) -> Any:
    layout = _HALF if t.element_size() == 2 else _FLOAT_ROW
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, cols], layout)


def _product(
    act: Tensor,
    weight: Tensor,
    out: Tensor,
    row_scales: Tensor,
    depth_scales: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    groups: int,
    choice: Width,
    forward: bool,
) -> None:
    """Launch ``product_kernel`` once, with act ``[M, depth]`` and W into out ``[M, rows]``."""
    (m, depth), rows = act.shape, out.shape[1]
    steps = ceil_div(depth, DEPTH)
    wide, extra = choice.wide, choice.extra or 64
    operands = (
        _boxes(act, wide, DEPTH),
        _boxes(act, extra, DEPTH),
        _boxes(weight, ROWS, DEPTH) if forward else _boxes(weight, DEPTH, ROWS),
        _boxes(depth_scales, 1, DEPTH),
        _boxes(out, wide, 64),
        _boxes(out, extra, 64),
        row_scales,
        row_scales if bias is None else bias.contiguous(),
        row_scales if shift is None else shift.contiguous(),
    )
    row_tiles = ceil_div(rows, ROWS)
    start(
        product_kernel,
        (min(ceil_div(m, choice.tokens) * row_tiles, multiprocessors(act)),),
        operands,
        (m,),
        (rows, steps, ceil_div(row_tiles, groups), ceil_div(steps, groups)),
        {
            "FORWARD": forward,
            "ONE_GROUP": forward or groups == 1,
            "HAS_BIAS": bias is not None,
            "HAS_SHIFT": shift is not None,
            "PAIRED_BF16": act.dtype is torch.bfloat16,
            "WIDE": wide,
            "EXTRA": choice.extra,
            "DEPTH": DEPTH,
            "STAGES": choice.stages,
        },
        {"num_warps": 4},
        act.device.index,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    *,
    choice: Width | None = None,
) -> Tensor:
    """Return y ``[M, N]`` of x ``[M, K]``, in x's dtype."""
    (m, k), n, groups = x.shape, weight.shape[0], scale_in.shape[0]
    choice = choice or _chosen(Problem("forward", m, n, k, groups, x.dtype, weight.dtype), x)
    u, v = plain.vectors(scale_out, scale_in)
    v = _aligned(v)
    if choice is None or n % 8 or not _fits(x, weight, v) or not _whole_groups(n, groups):
        return plain.forward(x, weight, scale_out, scale_in, bias, shift)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    with plain.guard(x):
        _product(x, weight, y, u, v, bias, shift, groups, choice, True)
    return y


def grad_input(
    dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, *, choice: Width | None = None
) -> Tensor:
    """Return dx ``[M, K]`` of dy ``[M, N]``, in dy's dtype."""
    (m, n), k, groups = dy.shape, weight.shape[1], scale_in.shape[0]
    choice = choice or _chosen(Problem("grad_input", m, n, k, groups, dy.dtype, weight.dtype), dy)
    u, v = plain.vectors(scale_out, scale_in)
    u = _aligned(u.float().view(1, n))  # u comes in boxes here, because the depth is N
    if choice is None or k % 8 or not _fits(dy, weight, u) or not _whole_groups(n, groups):
        return plain.grad_input(dy, weight, scale_out, scale_in)
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    with plain.guard(dy):
        _product(dy, weight, dx, v, u, None, None, groups, choice, False)
    return dx


def grad_scales(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    need_shift: bool,
    *,
    tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return du ``[N, 1]``, dv ``[groups, 1, K]`` and df ``[N]`` (``[0]`` without ``need_shift``), in float32.

    If the partial sums of all rows of W do not fit in ``WORKSPACE_BYTES``, slices of rows are processed one after
    another.
    """
    (m, n), k, groups = dy.shape, x.shape[1], scale_in.shape[0]
    tokens = tokens or split_tokens(m, n, k, multiprocessors(x))
    splits, k_tiles = ceil_div(m, tokens), ceil_div(k, GRAM_COLUMNS)
    few = 2 * splits * ceil_div(n, GRAM_ROWS) * k_tiles < multiprocessors(x)
    if few or not _fits(dy, x) or not weight.is_contiguous() or not _whole_groups(n, groups):
        return plain.grad_scales(dy, x, weight, scale_out, scale_in, need_shift)
    # row_slices counts one row of dv and one of df for each tile, at most half of what these tiles write
    slices = row_slices(n, k, groups, GRAM_ROWS, GRAM_COLUMNS, splits, WORKSPACE_BYTES // 2)
    if len(slices) > 1:
        run = functools.partial(_gram, need_shift=need_shift, tokens=tokens)
        return plain.in_slices(run, slices, dy, x, weight, scale_out, scale_in)
    return _gram(dy, x, weight, scale_out, scale_in, need_shift=need_shift, tokens=tokens)


def _gram(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, *, need_shift: bool, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`grad_scales` by one launch, and another that adds up its partial sums."""
    (m, n), k, groups = dy.shape, x.shape[1], scale_in.shape[0]
    splits, k_tiles = ceil_div(m, tokens), ceil_div(k, GRAM_COLUMNS)
    group_tiles = ceil_div(n // groups, GRAM_ROWS)
    u, v = plain.vectors(scale_out, scale_in)
    rows = (splits * k_tiles, splits * 2 * group_tiles, splits * k_tiles)
    partials = plain.partial_sums(n, k, groups, rows, need_shift, x.device)
    with plain.guard(x):
        start(
            gram_kernel,
            (splits * groups * group_tiles * k_tiles,),
            (_boxes(dy, TOKENS, GRAM_ROWS), _boxes(x, TOKENS, GRAM_COLUMNS), weight, u, v, *partials),
            (m, tokens, splits),
            (n, k, n // groups),
            {"HAS_SHIFT": need_shift, "STAGES": GRAM_STAGES},
            {"num_warps": 4},
            x.device.index,
        )
        return plain.add_up(partials, n, k, groups, rows, need_shift)
