"""Launch the Triton kernels: choose a tile, a load path and a grid for the tensors at hand.

The three public functions are the backend interface that ``rlrr_kernels.ops``
describes. ``config`` and ``path`` default to the heuristic's choice;
tests pass their own.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import tuned
from rlrr_kernels.backends.triton.config import Arithmetic, Config, Device, Kernel, Path
from rlrr_kernels.backends.triton.forward import forward_kernel
from rlrr_kernels.backends.triton.grad_input import grad_input_kernel
from rlrr_kernels.backends.triton.grad_scales import grad_scales_kernel, sum_partials_kernel
from rlrr_kernels.backends.triton.slices import in_slices, row_slices
from rlrr_kernels.backends.triton.start import ceil_div, start
from rlrr_kernels.backends.triton.sum_splits import sum_splits_kernel

#: Under ``TRITON_INTERPRET=1`` kernels run on CPU tensors, and choices are made as for this GPU.
INTERPRETED_DEVICE = Device(capability=(9, 0), multiprocessors=132, shared_memory=232448)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether the kernels were built for Triton's interpreter (decided when they were imported)."""
    return not isinstance(forward_kernel, triton.JITFunction)


@functools.cache
def interpreter_misfit() -> str | None:
    """Why the installed Triton's interpreter cannot run kernels with the installed NumPy, or None if it can."""
    import numpy

    # its interpreter makes Python numbers of arrays of one element, which NumPy refuses since 2.4
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if old and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return f"TRITON_INTERPRET=1 with Triton {triton.__version__} needs NumPy before 2.4, got {numpy.__version__}"
    return None


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot serve these tensors, or None if it can."""
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"x {x.dtype} with weight {weight.dtype}: it computes in float32, float16 and bfloat16"
    if interpreting():
        return interpreter_misfit() if x.device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors only"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"device {x.device}: it runs on NVIDIA GPUs"
    capability = configs.cuda_device(x.device.index).capability
    return None if capability >= (8, 0) else f"compute capability {capability}: it needs 8.0 or later"


def device_of(x: Tensor) -> Device:
    return INTERPRETED_DEVICE if interpreting() else configs.cuda_device(x.device.index)


def guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on x's device: Triton takes the current one."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _arithmetic(dtype: torch.dtype) -> Arithmetic:
    # not allow_tf32: reading it raises once the user has set fp32_precision; read for float32 alone, as it is slow
    return configs.arithmetic(dtype, dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32")


def _constants(config: Config, x: Tensor, kind: Arithmetic, boxes: bool) -> dict[str, Any]:
    """The last compile-time arguments of all three kernels."""
    return {
        "DESCRIPTORS": boxes,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "ROUND_TF32": kind == "tf32" and not interpreting(),
        "EMULATE_BF16": interpreting() and x.dtype is torch.bfloat16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
    }


def _paired(weight: Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and not interpreting()


def _options(num_warps: int, num_stages: int) -> dict[str, Any]:
    # fused multiply-adds are asked for: Triton's default will change
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def _fits_boxes(t: Tensor) -> bool:
    """Whether the copy engine can load tiles of a 2-D tensor: row-major, 16-byte base and rows."""
    rows, cols = t.stride()
    return cols == 1 and rows >= t.shape[1] and rows * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def _fits_vectors(t: Tensor) -> bool:
    """Whether Triton sees that rows can be loaded 16 bytes at a time: it looks for multiples of 16."""
    return t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 and t.data_ptr() % 16 == 0


def _path(device: Device, kind: Arithmetic, *tensors: Tensor, boxes: bool = True) -> Path:
    """The best way to load tiles of all these tensors."""
    if (
        boxes
        and device.has_wgmma
        and kind != "ieee"
        and all(map(_fits_boxes, tensors))
        and os.environ.get("RLRR_TRITON_DESCRIPTORS") != "0"
    ):
        return "boxes"
    return "vectors" if all(map(_fits_vectors, tensors)) else "elements"


def _loaded(
    kernel: Kernel,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    device: Device,
    activations: tuple[Tensor, ...],
    others: tuple[Tensor, ...],
    boxes: bool = True,
) -> tuple[Path, tuple[Tensor, ...]]:
    """The path for tiles of all these tensors, and the activations ``[M, K]`` or ``[M, N]``, copied where that pays.

    One number for all (a gradient of ``y.sum()``) or a transposed x would be loaded by the element. W, which no copy
    would serve for long, is among the others.
    """
    path = _path(device, kind, *activations, *others, boxes=boxes)
    if path == "boxes" or all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in activations):
        return path, activations
    copies = (t.new_empty(t.shape, device="meta") for t in activations)
    better = _path(device, kind, *copies, *others, boxes=boxes)
    if better == path:
        return path, activations
    fits = _fits_boxes if better == "boxes" else _fits_vectors
    x, weight = activations[-1], others[0]
    elements = sum(t.numel() for t in activations if not fits(t))
    sizes = (x.element_size(), weight.element_size())
    if not configs.copy_pays(kernel, x.shape[0], n, k, groups, kind, path, better, *sizes, elements, device):
        return path, activations
    return better, tuple(t if fits(t) else t.clone(memory_format=torch.contiguous_format) for t in activations)


def _boxes(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, t.shape, t.stride(), [rows, cols])


def vectors(scale_out: Tensor, scale_in: Tensor) -> tuple[Tensor, Tensor]:
    """u ``[N, 1]`` and v ``[groups, 1, K]`` as contiguous ``[N]``, 32 bits at most, and ``[groups, K]`` in float32.

    The stages of a box of 32 elements of v in 16 bits would lie 64 bytes apart, where the copy engine wants 128.
    """
    u, v = scale_out.squeeze(1), scale_in.squeeze(1).float()
    if u.dtype is torch.float64:
        u = u.float()
    return u.contiguous(), v.contiguous()


def _splits(config: Config, steps: int) -> tuple[int, int]:
    """Splits of a sum of so many steps, none of them empty, and the steps of each (of the last: at most)."""
    split_steps = ceil_div(steps, config.splits)
    return ceil_div(steps, split_steps), split_steps


def _sum_splits(partial: Tensor, bias: Tensor | None, shift: Tensor | None, out: Tensor) -> None:
    """out ``[M, N]`` from partial ``[splits, M, N]`` and what is to be added to each row."""
    splits, m, n = partial.shape
    rows, cols = 4, 256
    start(
        sum_splits_kernel,
        (ceil_div(m, rows) * ceil_div(n, cols),),
        (partial, partial if bias is None else bias, partial if shift is None else shift, out),
        (m, n, splits),
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
    config: Config | None = None,
    path: Path | None = None,
) -> Tensor:
    """y ``[M, N]`` of x ``[M, K]``, in x's dtype."""
    (m, k), n = x.shape, weight.shape[0]
    groups = scale_in.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    u, v = vectors(scale_out, scale_in)
    device, kind = device_of(x), _arithmetic(x.dtype)
    if path is None:
        path, (x,) = _loaded("forward", n, k, groups, kind, device, (x,), (weight, v))
    if config is None:
        problem = (m, n, k, groups, kind, path, x.element_size(), weight.element_size())
        config = tuned.find("forward", *problem, x.device.index) or configs.forward_config(*problem, device)
    bm, bn, bk, boxes = config.block_m, config.block_n, config.block_k, path == "boxes"
    splits, split_steps = _splits(config, ceil_div(k, bk))
    out = y if splits == 1 else torch.empty((splits, m, n), dtype=torch.float32, device=x.device)
    bias, shift = (None if t is None else t.contiguous() for t in (bias, shift))
    has_bias, has_shift = bias is not None, shift is not None
    bias, shift = u if bias is None else bias, u if shift is None else shift
    operands: tuple[Any, ...] = (x, weight, v)
    if boxes:
        operands = (_boxes(x, bm, bk), _boxes(weight, bn, bk), _boxes(v, 1, bk))
    with guard(x):
        start(
            forward_kernel,
            (ceil_div(m, bm) * groups * ceil_div(n // groups, bn), splits),
            (*operands, u, bias, shift, out),
            (m, n, k, n // groups, split_steps * bk, *x.stride(), *weight.stride(), v.stride(0), n),
            {
                "HAS_BIAS": has_bias and splits == 1,
                "HAS_SHIFT": has_shift and splits == 1,
                "SPLIT": splits > 1,
                "WEIGHT_LEFT": device.weight_left,
                "EVEN_K": k % bk == 0,
                "PAIRED_BF16": _paired(weight),
                **_constants(config, x, kind, boxes),
            },
            _options(config.num_warps, config.num_stages),
            x.device.index,
        )
        if splits > 1:
            _sum_splits(out, bias if has_bias else None, shift if has_shift else None, y)
    return y


def grad_input(
    dy: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    *,
    config: Config | None = None,
    path: Path | None = None,
) -> Tensor:
    """dx ``[M, K]`` of dy ``[M, N]``, in dy's dtype."""
    (m, n), k = dy.shape, weight.shape[1]
    groups = scale_in.shape[0]
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    u, v = vectors(scale_out, scale_in)
    device, kind = device_of(dy), _arithmetic(dy.dtype)
    if path is None:
        # a box that ran into the next group would bring its rows into the sum
        whole = groups == 1 or (n // groups) % configs.GROUP_STEP == 0
        path, (dy,) = _loaded("grad_input", n, k, groups, kind, device, (dy,), (weight,), boxes=whole)
    if config is None:
        problem = (m, n, k, groups, kind, path, dy.element_size(), weight.element_size())
        config = tuned.find("grad_input", *problem, dy.device.index) or configs.grad_input_config(*problem, device)
    bm, bn, bk, boxes = config.block_m, config.block_n, config.block_k, path == "boxes"
    splits, split_steps = _splits(config, groups * ceil_div(n // groups, bn))
    out = dx if splits == 1 else torch.empty((splits, m, k), dtype=torch.float32, device=dy.device)
    operands: tuple[Any, ...] = (dy, weight)
    if boxes:
        operands = (_boxes(dy, bm, bn), _boxes(weight, bn, bk))
    with guard(dy):
        start(
            grad_input_kernel,
            (ceil_div(m, bm) * ceil_div(k, bk), splits),
            (*operands, u, v, out),
            (m, n, k, n // groups, split_steps, *dy.stride(), *weight.stride(), v.stride(0), k),
            {
                "ONE_GROUP": groups == 1,
                "SPLIT": splits > 1,
                "WEIGHT_LEFT": device.weight_left,
                "EVEN_N": (n // groups) % bn == 0,
                "PAIRED_BF16": _paired(weight),
                **_constants(config, dy, kind, boxes),
            },
            _options(config.num_warps, config.num_stages),
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
    config: Config | None = None,
    split_tokens: int | None = None,
    path: Path | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """du ``[N, 1]``, dv ``[groups, 1, K]`` and df ``[N]`` (``[0]`` unless asked for), float32.

    Where the partial sums of all rows of W would not fit in ``configs.WORKSPACE_BYTES``, slices of rows take turns.
    """
    (m, n), k = dy.shape, x.shape[1]
    groups = scale_in.shape[0]
    u, v = vectors(scale_out, scale_in)
    device, kind = device_of(x), _arithmetic(x.dtype)
    given: dict[str, Any] = {"config": config, "split_tokens": split_tokens, "path": path}
    if path is None:
        # W is read once, after the loop, but into the same registers: boxes do not help it
        boxed = _fits_vectors(weight)
        path, (dy, x) = _loaded("grad_scales", n, k, groups, kind, device, (dy, x), (weight,), boxes=boxed)
    if config is None or split_tokens is None:
        problem = (m, n, k, groups, kind, path, x.element_size())
        found = tuned.find("grad_scales", *problem, weight.element_size(), x.device.index)
        config, split_tokens = found or configs.grad_scales_config(*problem, device, weight.element_size())
    bm, bn, bk, boxes = config.block_m, config.block_n, config.block_k, path == "boxes"
    splits, k_tiles = ceil_div(m, split_tokens), ceil_div(k, bk)
    slices = row_slices(n, k, groups, bn, bk, splits, configs.WORKSPACE_BYTES)
    if len(slices) > 1:
        if all(first * dy.element_size() % 16 == 0 for _, first, _ in slices):  # else a slice loads in another way
            given = {"config": config, "split_tokens": split_tokens, "path": path}

        def run(*part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return grad_scales(*part, need_shift, **given)

        return in_slices(run, slices, dy, x, weight, scale_out, scale_in)
    group_tiles = ceil_div(n // groups, bn)
    rows = (splits * k_tiles, splits * group_tiles, splits)
    partials = partial_sums(n, k, groups, rows, need_shift, x.device)
    operands: tuple[Any, ...] = (dy, dy, x)
    if boxes:
        operands = (dy, _boxes(dy, bm, bn), _boxes(x, bm, bk))
    strides = (*dy.stride(), *x.stride(), *weight.stride(), v.stride(0))
    with guard(x):
        start(
            grad_scales_kernel,
            (splits * groups * group_tiles * (k_tiles + need_shift),),
            (*operands, weight, u, v, *partials),
            (m, n, k, n // groups, split_tokens, splits, *strides),
            {"HAS_SHIFT": need_shift, **_constants(config, x, kind, boxes)},
            _options(config.num_warps, config.num_stages),
            x.device.index,
        )
        return add_up(partials, n, k, groups, rows, need_shift)


def partial_sums(
    n: int, k: int, groups: int, rows: tuple[int, int, int], need_shift: bool, device: torch.device
) -> tuple[Tensor, ...]:
    """Memory for rows of partial sums of du ``[rows[0], N]``, dv ``[groups, rows[1], K]`` and df ``[rows[2], N]``.

    One allocation for the three, each from a multiple of 16 bytes on: others are other code.
    """
    parts = (rows[0] * n, groups * rows[1] * k, rows[2] * n if need_shift else 0)
    sizes = tuple(4 * ceil_div(part, 4) for part in parts)
    return torch.empty(sum(sizes), dtype=torch.float32, device=device).split(sizes)


def add_up(
    partials: tuple[Tensor, ...], n: int, k: int, groups: int, rows: tuple[int, int, int], need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """du ``[N, 1]``, dv ``[groups, 1, K]`` and df ``[N]`` (``[0]`` unless asked for) of :func:`partial_sums`."""
    new: dict[str, Any] = {"dtype": torch.float32, "device": partials[0].device}
    du, dv = torch.empty((n, 1), **new), torch.empty((groups, 1, k), **new)
    df = torch.empty(n if need_shift else 0, **new)
    block = 128
    start(
        sum_partials_kernel,
        (ceil_div(n, block) * (1 + need_shift) + groups * ceil_div(k, block),),
        (*partials, du, dv, df),
        (n, k, groups, *rows),
        {"HAS_SHIFT": need_shift, "ROWS": 16, "COLS": block},
        _options(num_warps=4, num_stages=2),
        du.device.index,
    )
    return du, dv, df
