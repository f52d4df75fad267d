"""Launch the Triton kernels: choose a tile, a load path and a grid for the tensors at hand.

The three public functions are the backend interface that ``rlrr_kernels.ops``
describes. ``config`` and ``path`` default to the heuristic's choice;
tests pass their own.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton.config import Arithmetic, Config, Device, Path
from rlrr_kernels.backends.triton.forward import forward_kernel
from rlrr_kernels.backends.triton.grad_input import grad_input_kernel
from rlrr_kernels.backends.triton.grad_scales import grad_scales_kernel, sum_partials_kernel

#: Under ``TRITON_INTERPRET=1`` kernels run on CPU tensors, and choices are made as for this GPU.
INTERPRETED_DEVICE = Device(capability=(9, 0), multiprocessors=132, shared_memory=232448)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether the kernels were built for Triton's interpreter (decided when they were imported)."""
    return not isinstance(forward_kernel, triton.JITFunction)


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot serve these tensors, or None if it can."""
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"x {x.dtype} with weight {weight.dtype}: it computes in float32, float16 and bfloat16"
    if interpreting():
        return None if x.device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors only"
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"device {x.device}: it runs on NVIDIA GPUs"
    capability = configs.cuda_device(x.device.index).capability
    return None if capability >= (8, 0) else f"compute capability {capability}: it needs 8.0 or later"


def _device(x: Tensor) -> Device:
    return INTERPRETED_DEVICE if interpreting() else configs.cuda_device(x.device.index)


def _guard(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launch on x's device: Triton takes the current one."""
    if x.device.type == "cpu" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _arithmetic(dtype: torch.dtype) -> Arithmetic:
    # not allow_tf32: reading it raises once the user has set fp32_precision
    return configs.arithmetic(dtype, torch.backends.cuda.matmul.fp32_precision == "tf32")


def _options(config: Config, x: Tensor, kind: Arithmetic, boxes: bool) -> dict[str, Any]:
    """What all three kernels take at compile time. Fused multiply-adds are asked for: Triton's default will change."""
    return {
        "DESCRIPTORS": boxes,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "ROUND_TF32": kind == "tf32" and not interpreting(),
        "EMULATE_BF16": interpreting() and x.dtype is torch.bfloat16,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": True,
    }


def _fits_boxes(t: Tensor) -> bool:
    """Whether the copy engine can load tiles of a 2-D tensor: row-major, 16-byte base and rows."""
    return (
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
    )


def _fits_vectors(t: Tensor) -> bool:
    """Whether Triton sees that rows can be loaded 16 bytes at a time: it looks for multiples of 16."""
    return t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 and t.data_ptr() % 16 == 0


def _path(device: Device, kind: Arithmetic, *tensors: Tensor, boxes: bool = True) -> Path:
    """The best way to load tiles of all these tensors."""
    boxes = boxes and device.has_wgmma and kind != "ieee" and os.environ.get("RLRR_TRITON_DESCRIPTORS") != "0"
    if boxes and all(map(_fits_boxes, tensors)):
        return "boxes"
    return "vectors" if all(map(_fits_vectors, tensors)) else "elements"


def _boxes(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, t.shape, t.stride(), [rows, cols])


def _vectors(scale_out: Tensor, scale_in: Tensor) -> tuple[Tensor, Tensor]:
    """u ``[N, 1]`` and v ``[groups, 1, K]`` as contiguous ``[N]`` and ``[groups, K]``, 32 bits at most."""
    u, v = scale_out[:, 0], scale_in[:, 0]
    if u.dtype is torch.float64 or v.dtype is torch.float64:
        u, v = u.float(), v.float()
    return u.contiguous(), v.contiguous()


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
    u, v = _vectors(scale_out, scale_in)
    device, kind = _device(x), _arithmetic(x.dtype)
    if path is None:
        path = _path(device, kind, x, weight, v)
    if config is None:
        config = configs.forward_config(m, n, k, groups, kind, path, x.element_size(), weight.element_size(), device)
    bm, bn, bk, boxes = config.block_m, config.block_n, config.block_k, path == "boxes"
    grid = (triton.cdiv(m, bm) * groups * triton.cdiv(n // groups, bn),)
    with _guard(x):
        forward_kernel[grid](
            _boxes(x, bm, bk) if boxes else x,
            _boxes(weight, bn, bk) if boxes else weight,
            _boxes(v, 1, bk) if boxes else v,
            u,
            u if bias is None else bias.contiguous(),
            u if shift is None else shift.contiguous(),
            y,
            m,
            n,
            k,
            n // groups,
            *x.stride(),
            *weight.stride(),
            v.stride(0),
            y.stride(0),
            HAS_BIAS=bias is not None,
            HAS_SHIFT=shift is not None,
            EVEN_K=k % bk == 0,
            **_options(config, x, kind, boxes),
        )
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
    u, v = _vectors(scale_out, scale_in)
    device, kind = _device(dy), _arithmetic(dy.dtype)
    if path is None:
        # a box that ran into the next group would bring its rows into the sum
        whole = groups == 1 or (n // groups) % configs.GROUP_STEP == 0
        path = _path(device, kind, dy, weight, boxes=whole)
    if config is None:
        config = configs.grad_input_config(
            m, n, k, groups, kind, path, dy.element_size(), weight.element_size(), device
        )
    bm, bn, bk, boxes = config.block_m, config.block_n, config.block_k, path == "boxes"
    with _guard(dy):
        grad_input_kernel[(triton.cdiv(m, bm) * triton.cdiv(k, bk),)](
            _boxes(dy, bm, bn) if boxes else dy,
            _boxes(weight, bn, bk) if boxes else weight,
            u,
            v,
            dx,
            m,
            n,
            k,
            n // groups,
            *dy.stride(),
            *weight.stride(),
            v.stride(0),
            dx.stride(0),
            ONE_GROUP=groups == 1,
            WEIGHT_LEFT=device.has_wgmma,
            EVEN_N=(n // groups) % bn == 0,
            **_options(config, dy, kind, boxes),
        )
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
    """du ``[N, 1]``, dv ``[groups, 1, K]`` and df ``[N]`` (``[0]`` unless asked for), float32."""
    (m, n), k = dy.shape, x.shape[1]
    groups = scale_in.shape[0]
    u, v = _vectors(scale_out, scale_in)
    device, kind = _device(x), _arithmetic(x.dtype)
    if path is None:
        # W is read once, after the loop, but into the same registers: boxes do not help it
        path = _path(device, kind, dy, x, weight, boxes=_fits_vectors(weight))
    if config is None or split_tokens is None:
        config, split_tokens = configs.grad_scales_config(m, n, k, groups, kind, path, x.element_size(), device)
    bm, bn, bk, boxes = config.block_m, config.block_n, config.block_k, path == "boxes"
    splits, k_tiles = triton.cdiv(m, split_tokens), triton.cdiv(k, bk)
    group_tiles = triton.cdiv(n // groups, bn)
    new: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    du, dv = torch.empty((n, 1), **new), torch.empty((groups, 1, k), **new)
    df = torch.empty(n if need_shift else 0, **new)
    # one allocation for the three kinds of partial sums
    sizes = (splits * k_tiles * n, groups * splits * group_tiles * k, splits * n if need_shift else 0)
    du_partial, dv_partial, df_partial = torch.empty(sum(sizes), **new).split(sizes)
    block = 128
    with _guard(x):
        grad_scales_kernel[(splits * groups * group_tiles * (k_tiles + need_shift),)](
            dy,
            _boxes(dy, bm, bn) if boxes else dy,
            _boxes(x, bm, bk) if boxes else x,
            weight,
            u,
            v,
            du_partial,
            dv_partial,
            df_partial,
            m,
            n,
            k,
            n // groups,
            split_tokens,
            splits,
            *dy.stride(),
            *x.stride(),
            *weight.stride(),
            v.stride(0),
            HAS_SHIFT=need_shift,
            **_options(config, x, kind, boxes),
        )
        n_blocks, k_blocks = triton.cdiv(n, block), triton.cdiv(k, block)
        sum_partials_kernel[(n_blocks * (1 + need_shift) + groups * k_blocks,)](
            du_partial,
            dv_partial,
            df_partial,
            du,
            dv,
            df,
            n,
            k,
            groups,
            splits * k_tiles,
            splits * group_tiles,
            splits,
            HAS_SHIFT=need_shift,
            ROWS=16,
            COLS=block,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return du, dv, df
