"""Whether a kernel's result is right, by the yardstick of the package's tests.

The error against float64 may be at most twice that of the plain PyTorch formula in the same dtype, plus one
rounding; and no element may be more than four times as wrong as the formula's worst, so that a few wrong ones
show among many. Scale gradients are float32 by contract, and so is their yardstick.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlrr_kernels import reference
from rlrr_kernels.tune.problem import Task, Tensors

#: Tokens of one float64 product, which bounds what it takes besides its result.
_CHUNK = 8192


class Expected(NamedTuple):
    """One result: exact, in float64, and as the plain formula gives it, in the dtype that is due.

    ``more``: relative error allowed beyond the formula's.
    """

    name: str
    exact: Tensor
    plain: Tensor
    more: float = 0.0


@torch.no_grad()
def expected(task: Task, t: Tensors) -> list[Expected]:
    """What the kernel should return for these tensors, in its order."""
    weight, u, v = t.weight.double(), t.scale_out.double(), t.scale_in.double()
    if task.layer.kernel == "forward":
        bias, shift = t.bias.double(), t.shift.double()
        y = torch.cat([reference.forward(x.double(), weight, u, v, bias, shift) for x in t.x.split(_CHUNK)])
        plain = reference.formula(t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift)
        return [Expected("y", y, plain)]
    if task.layer.kernel == "grad_input":
        dx = torch.cat([reference.grad_input(dy.double(), weight, u, v) for dy in t.dy.split(_CHUNK)])
        return [Expected("dx", dx, reference.grad_input(t.dy, t.weight, t.scale_out, t.scale_in))]
    chunks = zip(t.dy.split(_CHUNK), t.x.split(_CHUNK), strict=True)
    parts = [reference.grad_scales(dy.double(), x.double(), weight, u, v, True) for dy, x in chunks]
    plains = reference.grad_scales(t.dy, t.x, t.weight, t.scale_out, t.scale_in, True)
    # tensor cores cut when they add to a float32 sum, once every 16 products, always towards zero
    on_tensor_cores = t.x.is_cuda and t.x.element_size() == 2
    cut = task.m / 16 * torch.finfo(torch.float32).eps / 2 if on_tensor_cores else 0.0
    return [
        Expected(name, torch.stack([part[i] for part in parts]).sum(0), plains[i], cut)
        for i, name in enumerate(("du", "dv", "df"))
    ]


def misfit(got: Sequence[Tensor], wanted: Sequence[Expected]) -> str | None:
    """Why the results are not right, or None if they are."""
    for value, (name, exact, plain, more) in zip(got, wanted, strict=True):
        if value.shape != plain.shape or value.dtype != plain.dtype:
            return f"{name}: {value.dtype} {list(value.shape)}, expected {plain.dtype} {list(plain.shape)}"
        if not bool(torch.isfinite(value).all()):
            return f"{name}: not finite"
        eps = torch.finfo(plain.dtype).eps
        # independent roundings average out over many narrow values
        rounding = eps / max(plain.numel(), 1) ** 0.5 if plain.itemsize == 2 else eps
        ours, theirs = value.double() - exact, plain.double() - exact
        norm = exact.norm().clamp_min(1e-300)
        error, allowed = float(ours.norm() / norm), float(2 * theirs.norm() / norm) + rounding + more
        if not error <= allowed:
            return f"{name}: error {error:.1e}, allowed {allowed:.1e}"
        largest = exact.abs().max().clamp_min(1e-300)
        error = float(ours.abs().max() / largest)
        allowed = float(4 * theirs.abs().max() / largest) + 16 * torch.finfo(torch.float32).eps + more
        if not error <= allowed:
            return f"{name}: an element is off by {error:.1e} of the largest, allowed {allowed:.1e}"
    return None
