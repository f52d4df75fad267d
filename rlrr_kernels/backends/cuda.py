"""The CUDA C++ kernels of ``csrc/cuda`` as a backend, for compute capability 8.0 and later.

``RLRR_CUDA_HOPPER=1`` enables the experimental kernels for Hopper GPUs (bulk tensor copies and wgmma) for the tensors
that they support. They are off by default; the variable is read once.
"""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from rlrr_kernels.backends import library
from rlrr_kernels.backends.problem import uses_tf32
from rlrr_kernels.backends.reference import grad_shift as grad_shift

if torch.version.cuda is None:
    raise ImportError(f"torch {torch.__version__} is built without CUDA")
library.load("cuda", "nvcc, on the PATH or in CUDA_HOME, and a torch built for CUDA")

#: Whether the kernels for Hopper may be used.
HOPPER = os.environ.get("RLRR_CUDA_HOPPER") == "1"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ops = torch.ops.rlrr_cuda
_forward, _grad_input, _grad_scales = (getattr(_ops, name).default for name in ("forward", "grad_input", "grad_scales"))


@functools.cache
def _unusable(index: int) -> str:
    """Return why no kernel can run on a GPU, or an empty string. The library is asked once for each GPU."""
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"compute capability {capability}: it needs 8.0 or later"
    reason = _ops.unusable(index)
    return f"{torch.cuda.get_device_name(index)}: {reason}" if reason else ""


def unsupported(x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """Return why this backend cannot serve these tensors at this rank, or None if it can."""
    if rank != 1:
        return f"rank {rank}: it computes rank 1"
    if x.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"x {x.dtype} with weight {weight.dtype}: it computes in float32, float16 and bfloat16"
    if not x.is_cuda:
        return f"device {x.device}: it runs on NVIDIA GPUs"
    return _unusable(x.get_device()) or None


def build() -> str:
    """Return what the library was built with."""
    return _ops.build()


def forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Return y ``[M, N]`` of x ``[M, K]``, in x's dtype."""
    return _forward(x, weight, scale_out, scale_in, bias, shift, uses_tf32(x.dtype), HOPPER)


def grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    """Return dx ``[M, K]`` of dy ``[M, N]``, in dy's dtype."""
    return _grad_input(dy, weight, scale_out, scale_in, uses_tf32(dy.dtype), HOPPER)


def grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return du ``[N, 1]``, dv ``[groups, 1, K]`` and df ``[N]`` (``[0]`` without ``need_shift``), in float32."""
    return _grad_scales(dy, x, weight, scale_out, scale_in, need_shift, uses_tf32(x.dtype), HOPPER)
