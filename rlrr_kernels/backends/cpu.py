"""The C++ ops of ``csrc/cpu``: W' is formed a tile or a panel at a time, in cache.

AVX2 and AVX-512 have kernels of their own for float32 and bfloat16, AMX tiles for bfloat16; BLAS serves float64 and
older CPUs. ``RLRR_CPU_CAPABILITY`` (baseline, avx2, avx512, avx512_bf16,
amx) limits the instructions that they use; it is read once.

With ``avx512_bf16`` and ``amx`` subnormal numbers of bfloat16 (below 2**-126) count as zero, as operands and as
results: so the instructions have it.
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
# overloads, not packets: resolving one costs a microsecond a call
_forward = torch.ops.rlrr_cpu.forward.default
_grad_input = torch.ops.rlrr_cpu.grad_input.default
_grad_scales = torch.ops.rlrr_cpu.grad_scales.default
_grad_shift = torch.ops.rlrr_cpu.grad_shift.default


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why this backend cannot serve these tensors, or None if it can."""
    if x.device.type != "cpu":
        return f"device {x.device}: it runs on CPUs"
    if (x.dtype, weight.dtype) not in _PAIRS:
        return (
            f"x {x.dtype} with weight {weight.dtype}: it computes in float32 and bfloat16, with a weight of either, "
            "and in float64"
        )
    return None


def build() -> str:
    """What the library was built with, and which instructions it uses on this CPU."""
    return torch.ops.rlrr_cpu.build()


def forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """y ``[M, N]`` of x ``[M, K]``, in x's dtype."""
    return _forward(x, weight, scale_out, scale_in, bias, shift)


def grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    """dx ``[M, K]`` of dy ``[M, N]``, in dy's dtype."""
    return _grad_input(dy, weight, scale_out, scale_in)


def grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """du ``[N, 1]``, dv ``[groups, 1, K]`` and df ``[N]`` (``[0]`` unless asked for), float32 or float64."""
    return _grad_scales(dy, x, weight, scale_out, scale_in, need_shift)


def grad_shift(dy: Tensor) -> Tensor:
    """df ``[N]`` of dy ``[M, N]``, float32 or float64: the same bits as from :func:`grad_scales`."""
    return _grad_shift(dy)
