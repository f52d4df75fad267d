"""The C++ kernels of ``csrc/cpu`` as a backend: W' is formed in cache, a tile or a panel at a time.

Float32 and bfloat16 have kernels for AVX2 and AVX-512, and bfloat16 for AMX; float64 and older CPUs use BLAS.
``RLRR_CPU_CAPABILITY`` (baseline, avx2, avx512, avx512_bf16 or amx) limits the instructions; it is read once.

With ``avx512_bf16`` and ``amx`` subnormal numbers of bfloat16 (below 2**-126) are treated as zero, in operands and
results, because the instructions do so.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from rlrr_kernels.backends import library

_CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")

if os.environ.get("RLRR_CPU_CAPABILITY") not in (None, "", *_CAPABILITIES):
    raise ValueError(
        f"RLRR_CPU_CAPABILITY: expected one of {', '.join(_CAPABILITIES)}, got {os.environ['RLRR_CPU_CAPABILITY']!r}"
    )
library.load("cpu", "a C++ compiler")

_PAIRS = {(torch.float64, torch.float64)} | {
    (x, weight) for x in (torch.float32, torch.bfloat16) for weight in (torch.float32, torch.bfloat16)
}
# overloads instead of packets, because resolving a packet costs a microsecond a call
_forward = torch.ops.rlrr_cpu.forward.default
_grad_input = torch.ops.rlrr_cpu.grad_input.default
_grad_scales = torch.ops.rlrr_cpu.grad_scales.default
_grad_shift = torch.ops.rlrr_cpu.grad_shift.default


def unsupported(x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """Return why this backend cannot serve these tensors, or None if it can; it serves every rank."""
    if x.device.type != "cpu":
        return f"device {x.device}: it runs on CPUs"
    if (x.dtype, weight.dtype) not in _PAIRS:
        return (
            f"x {x.dtype} with weight {weight.dtype}: it computes in float32 and bfloat16, with a weight of either, "
            "and in float64"
        )
    return None


def build() -> str:
    """Return what the library was built with, and which instructions it uses on this CPU."""
    return torch.ops.rlrr_cpu.build()


def forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Return y ``[M, N]`` of x ``[M, K]``, in x's dtype."""
    return _forward(x, weight, scale_out, scale_in, bias, shift)


def grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    """Return dx ``[M, K]`` of dy ``[M, N]``, in dy's dtype."""
    return _grad_input(dy, weight, scale_out, scale_in)


def grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return du ``[N, r]``, dv ``[groups, r, K]`` and df ``[N]`` or, without ``need_shift``, ``[0]``."""
    return _grad_scales(dy, x, weight, scale_out, scale_in, need_shift)


def grad_shift(dy: Tensor) -> Tensor:
    """Return df ``[N]`` of dy ``[M, N]``, float32 or float64, with the same bits as :func:`grad_scales`."""
    return _grad_shift(dy)
