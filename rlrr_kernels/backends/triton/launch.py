"""The plain Triton kernels as a backend: chooses a tile and a grid for the given tensors, and launches the kernels.

``choice`` of the passes is what was measured for the problem (:mod:`rlrr_kernels.backends.tuned`), else the
choice of the cost model (:mod:`rlrr_kernels.backends.triton.choose`); tests and ``rlrr-tune`` pass their own. A larger
rank, whose W' is formed in panels, has no tile to choose: forward and grad_input ignore it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from rlrr_kernels.backends import panels, tuned
from rlrr_kernels.backends.problem import Problem, uses_tf32
from rlrr_kernels.backends.triton import choose
from rlrr_kernels.backends.triton.choose import Choice, Device, Slice, ceil_div, row_slices
from rlrr_kernels.backends.triton.forward import forward_kernel
from rlrr_kernels.backends.triton.grad_input import grad_input_kernel
from rlrr_kernels.backends.triton.grad_scales import grad_scales_kernel, sum_partials_kernel
from rlrr_kernels.backends.triton.panel import panel_kernel
from rlrr_kernels.backends.triton.start import start
from rlrr_kernels.backends.triton.sum_splits import sum_splits_kernel

#: The GPU for which tiles are chosen under ``TRITON_INTERPRET=1``, where kernels run on CPU tensors.
INTERPRETED_DEVICE = Device(capability=(9, 0), multiprocessors=132, shared_memory=232448)

#: Rows or columns of a panel of W', also where they take more than the scratch: each panel reads all of x or dy again,
#: and a product with a thin one fills no GPU.
LEAST = 256

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FIELDS = {field.name for field in dataclasses.fields(Choice)}


def interpreting() -> bool:
    """Return whether the kernels run in Triton's interpreter, which is decided when they are imported."""
    return not isinstance(forward_kernel, triton.JITFunction)


@functools.cache
def interpreter_misfit() -> str | None:
    """Return why the installed Triton's interpreter cannot run kernels with the installed NumPy, or None if it can."""
    import numpy

    # it converts arrays of one element to Python numbers in a way that NumPy refuses since 2.4
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return f"TRITON_INTERPRET=1 with Triton {triton.__version__} needs NumPy before 2.4, got {numpy.__version__}"
    return None


def unsupported(x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """Return why this backend cannot serve these tensors at this rank, or None if it can."""
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"x {x.dtype} with weight {weight.dtype}: it computes in float32, float16 and bfloat16"
    if interpreting():
        return interpreter_misfit() if x.device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors only"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"device {x.device}: it runs on NVIDIA GPUs"
    capability = choose.cuda_device(x.device.index).capability
    return None if capability >= (8, 0) else f"compute capability {capability}: it needs 8.0 or later"


def device_of(x: Tensor) -> Device:
    """Return the GPU for which tiles are chosen."""
    return INTERPRETED_DEVICE if interpreting() else choose.cuda_device(x.device.index)


def guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which x's GPU is the current one, on which Triton launches."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _chosen(problem: Problem, x: Tensor, aligned: bool) -> Choice:
    """Return what was measured for a problem, else the cost model's choice."""
    device = device_of(x)
    entry = tuned.find(problem, x.device)
    if entry is not None and entry.backend == "triton" and aligned and set(entry.tile or ()) == _FIELDS:
        choice = Choice(**entry.tile)  # type: ignore[arg-type]
        if choose.refusal(problem, choice, device) is None:
            return choice
    return choose.choose(problem, device, aligned)


def _constants(choice: Choice, x: Tensor, tf32: bool) -> dict[str, Any]:
    """Return the compile-time constants that all three kernels take last."""
    return {
        "PRECISION": "tf32" if tf32 else "ieee",
        "ROUND_TF32": tf32 and not interpreting(),
        "EMULATE_BF16": interpreting() and x.dtype is torch.bfloat16,
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "BLOCK_K": choice.block_k,
    }


def _paired(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and not interpreting()


def _options(num_warps: int, num_stages: int) -> dict[str, Any]:
    # fused multiply-adds are requested because Triton's default will change
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def _aligned(t: Tensor) -> bool:
    """Return whether Triton finds that rows can be loaded 16 bytes at a time: it tests for multiples of 16."""
    (_, cols), (row, col) = t.shape, t.stride()
    return col == 1 and row % 16 == 0 and cols % 16 == 0 and t.data_ptr() % 16 == 0


def _loadable(weight: Tensor, *activations: Tensor) -> tuple[bool, tuple[Tensor, ...]]:
    """Make the activations loadable 16 bytes at a time, by a copy if their layout alone prevents it.

    Every tile would load a transposed x, or an expanded number (the gradient of ``y.sum()``), one element at a time.

    Returns:
        Whether W and the activations can be loaded 16 bytes at a time, and the activations.
    """
    if not _aligned(weight) or any(t.shape[1] % 16 for t in activations):
        return False, activations
    return True, tuple(t if _aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in activations)


def vectors(scale_out: Tensor, scale_in: Tensor) -> tuple[Tensor, Tensor]:
    """Return U as contiguous ``[N * r]``, of at most 32 bits, and V as contiguous ``[groups * r, K]`` in float32."""
    u, v = scale_out.reshape(-1), scale_in.reshape(-1, scale_in.shape[2]).float()
    if u.dtype is torch.float64:
        u = u.float()
    return u.contiguous(), v.contiguous()


class _Rescaled(panels.Panels):
    """Forms panels by a kernel."""

    def __init__(self, weight: Tensor, scale_out: Tensor, scale_in: Tensor, dtype: torch.dtype) -> None:
        groups, rank, k = scale_in.shape
        u, v = vectors(scale_out, scale_in)
        self.weight, self.dtype = weight.unflatten(0, (groups, -1)), dtype
        self.strides = weight.stride()  # where a group has one row, unflatten's strides do not lead to the next row
        self.u, self.v = u.view(groups, -1, rank), v.view(groups, rank, k)

    def most(self, across: int) -> int:
        return max(panels.SCRATCH // across // self.dtype.itemsize, LEAST)

    def allocate(self, groups: int, rows: int, columns: int) -> None:
        self.scratch = self.weight.new_empty(groups * rows * columns, dtype=self.dtype)

    def panel(self, groups: slice, rows: slice, columns: slice) -> Tensor:
        weight, u, v = self.weight[groups, rows, columns], self.u[groups, rows], self.v[groups, :, columns]
        (count, group_rows, width), block_n, block_k = weight.shape, 32, 128
        panel = self.scratch[: weight.numel()].view(count * group_rows, width)
        start(
            panel_kernel,
            (count * ceil_div(group_rows, block_n) * ceil_div(width, block_k),),
            (weight, u, v, panel),
            (group_rows, u.shape[2]),
            (width, *self.strides, self.v.shape[2]),
            {
                "PAIRED_BF16": _paired(weight),
                "EMULATE_BF16": interpreting() and self.dtype is torch.bfloat16,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
            },
            _options(num_warps=4, num_stages=2),
            weight.device.index,
        )
        return panel


def _sum_splits(partial: Tensor, bias: Tensor | None, shift: Tensor | None, out: Tensor) -> None:
    """Add partial ``[splits, M, N]`` and, to each row, bias and shift ``[N]`` into out ``[M, N]``."""
    splits, m, n = partial.shape
    rows, cols = 4, 256
    start(
        sum_splits_kernel,
        (ceil_div(m, rows) * ceil_div(n, cols),),
        (partial, partial if bias is None else bias, partial if shift is None else shift, out),
        (m, splits),
        (n,),
        {
            "HAS_BIAS": bias is not None,
            "HAS_SHIFT": shift is not None,
            "EMULATE_BF16": interpreting() and out.dtype is torch.bfloat16,
            "ROWS": rows,
            "COLS": cols,
        },
        _options(num_warps=4, num_stages=2),
        out.device.index,
    )


def forward(
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    *,
    choice: Choice | None = None,
) -> Tensor:
    """Return y ``[M, N]`` of x ``[M, K]``, in x's dtype."""
    (m, k), n, (groups, rank, _) = x.shape, weight.shape[0], scale_in.shape
    tf32 = uses_tf32(x.dtype)
    problem = Problem("forward", m, n, k, groups, x.dtype, weight.dtype, tf32, rank)
    if not choose.in_registers(problem):
        with guard(x):
            return panels.forward(x, weight, scale_out, scale_in, bias, shift, rescaled=_Rescaled)
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    aligned, (x,) = _loadable(weight, x)
    choice = choice or _chosen(problem, x, aligned)
    splits, split_steps = choose.shares(ceil_div(k, choice.block_k), choice.splits)
    out = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    bias, shift = (None if t is None else t.contiguous() for t in (bias, shift))
    with guard(x):
        u, v = vectors(scale_out, scale_in)
        start(
            forward_kernel,
            (ceil_div(m, choice.block_m) * groups * ceil_div(n // groups, choice.block_n), splits),
            (x, weight, v, u, u if bias is None else bias, u if shift is None else shift, out),
            (m, split_steps),
            (n, k, n // groups, *x.stride(), *weight.stride(), rank * k, n),
            {
                "RANK": rank,
                "HAS_BIAS": bias is not None and splits == 1,
                "HAS_SHIFT": shift is not None and splits == 1,
                "SPLIT": splits > 1,
                "EVEN_K": k % choice.block_k == 0,
                "PAIRED_BF16": _paired(weight),
                **_constants(choice, x, tf32),
            },
            _options(choice.num_warps, choice.num_stages),
            x.device.index,
        )
        if splits > 1:
            _sum_splits(out, bias, shift, y)
    return y


def grad_input(
    dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, *, choice: Choice | None = None
) -> Tensor:
    """Return dx ``[M, K]`` of dy ``[M, N]``, in dy's dtype."""
    (m, n), k, (groups, rank, _) = dy.shape, weight.shape[1], scale_in.shape
    tf32 = uses_tf32(dy.dtype)
    problem = Problem("grad_input", m, n, k, groups, dy.dtype, weight.dtype, tf32, rank)
    if not choose.in_registers(problem):
        with guard(dy):
            return panels.grad_input(dy, weight, scale_out, scale_in, rescaled=_Rescaled)
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    aligned, (dy,) = _loadable(weight, dy)
    choice = choice or _chosen(problem, dy, aligned)
    bn = choice.block_n
    splits, split_steps = choose.shares(groups * ceil_div(n // groups, bn), choice.splits)
    out = dx if splits == 1 else torch.empty((splits, m, k), dtype=torch.float32, device=dy.device)
    with guard(dy):
        u, v = vectors(scale_out, scale_in)
        start(
            grad_input_kernel,
            (ceil_div(m, choice.block_m) * ceil_div(k, choice.block_k), splits),
            (dy, weight, u, v, out),
            (m, split_steps),
            (n, k, n // groups, *dy.stride(), *weight.stride(), rank * k, k),
            {
                "RANK": rank,
                "ONE_GROUP": groups == 1,
                "SPLIT": splits > 1,
                "EVEN_N": (n // groups) % bn == 0,
                "PAIRED_BF16": _paired(weight),
                **_constants(choice, dy, tf32),
            },
            _options(choice.num_warps, choice.num_stages),
            dy.device.index,
        )
        if splits > 1:
            _sum_splits(out, None, None, dx)
    return dx


def grad_scales(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    need_shift: bool,
    *,
    choice: Choice | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dU ``[N, r]``, dV ``[groups, r, K]`` and df ``[N]`` (``[0]`` without ``need_shift``), in float32.

    If the partial sums of all rows of W do not fit in ``choose.most_partial_bytes``, slices of rows are processed one
    after another.
    """
    (m, n), k, (groups, rank, _) = dy.shape, x.shape[1], scale_in.shape
    u, v = vectors(scale_out, scale_in)
    tf32 = uses_tf32(x.dtype)
    aligned, (dy, x) = _loadable(weight, dy, x)
    problem = Problem("grad_scales", m, n, k, groups, x.dtype, weight.dtype, tf32, rank)
    choice = choice or _chosen(problem, x, aligned)
    bm, bn, bk = choice.block_m, choice.block_n, choice.block_k
    splits, split_steps = choose.shares(ceil_div(m, bm), choice.splits)
    k_tiles = ceil_div(k, bk)
    slices = row_slices(n, k, groups, bn, bk, splits, choose.most_partial_bytes(problem), rank)
    if len(slices) > 1:
        run = functools.partial(grad_scales, need_shift=need_shift, choice=choice)
        return in_slices(run, slices, dy, x, weight, scale_out, scale_in)
    group_tiles = ceil_div(n // groups, bn)
    rows = (splits * k_tiles * choose.du_rows(rank), splits * group_tiles, splits)
    partials = partial_sums(n, k, groups, rows, need_shift, x.device, rank)
    with guard(x):
        start(
            grad_scales_kernel,
            (splits * groups * group_tiles * (k_tiles + need_shift),),
            (dy, x, weight, u, v, *partials),
            (m, split_steps * bm, splits),
            (n, k, n // groups, *dy.stride(), *x.stride(), *weight.stride(), rank * k),
            {"RANK": rank, "HAS_SHIFT": need_shift, **_constants(choice, x, tf32)},
            _options(choice.num_warps, choice.num_stages),
            x.device.index,
        )
        return add_up(partials, n, k, groups, rows, need_shift, rank)


def in_slices(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    slices: tuple[Slice, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``run(dy, x, weight, scale_out, scale_in)`` for one slice of rows after another, and join its results.

    dv is summed in the order of the slices.
    """
    dv = torch.zeros(scale_in.shape, dtype=torch.float32, device=x.device)
    du_parts, df_parts = [], []
    for group, first, end in slices:
        rows = slice(first, end)
        du, dv_part, df = run(dy[:, rows], x, weight[rows], scale_out[rows], scale_in[group : group + 1])
        dv[group] += dv_part[0]
        du_parts.append(du)
        df_parts.append(df)
    return torch.cat(du_parts), dv, torch.cat(df_parts)


def partial_sums(
    n: int, k: int, groups: int, rows: tuple[int, int, int], need_shift: bool, device: torch.device, rank: int = 1
) -> tuple[Tensor, ...]:
    """Allocate partial sums of dU ``[rows[0], N, r]``, dV ``[groups, rows[1], r, K]`` and df ``[rows[2], N]``."""
    sizes = (rows[0] * n * rank, groups * rows[1] * rank * k, rows[2] * n if need_shift else 0)
    return tuple(torch.empty(size, dtype=torch.float32, device=device) for size in sizes)


def add_up(
    partials: tuple[Tensor, ...],
    n: int,
    k: int,
    groups: int,
    rows: tuple[int, int, int],
    need_shift: bool,
    rank: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add up :func:`partial_sums` to dU ``[N, r]``, dV ``[groups, r, K]`` and df ``[N]`` or ``[0]``."""
    new: dict[str, Any] = {"dtype": torch.float32, "device": partials[0].device}
    du, dv = torch.empty((n, rank), **new), torch.empty((groups, rank, k), **new)
    df = torch.empty(n if need_shift else 0, **new)
    block = 128
    start(
        sum_partials_kernel,
        (ceil_div(n * rank, block) + groups * ceil_div(k * rank, block) + need_shift * ceil_div(n, block),),
        (*partials, du, dv, df),
        rows,
        (n, k, groups),
        {"RANK": rank, "HAS_SHIFT": need_shift, "ROWS": 16, "COLS": block},
        _options(num_warps=4, num_stages=2),
        du.device.index,
    )
    return du, dv, df
