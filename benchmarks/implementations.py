"""What is compared: this package, and how else one would compute the layer in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlrr_kernels import reference, rescaled_linear


@dataclass
class Inputs:
    """Tensors of one layer; u, v, f and x need gradients, W and b are frozen."""

    x: Tensor
    weight: Tensor
    scale_out: Tensor
    scale_in: Tensor
    bias: Tensor
    shift: Tensor
    dy: Tensor

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return self.x, self.scale_out, self.scale_in, self.shift


def make_inputs(m: int, n: int, k: int, groups: int, dtype: torch.dtype, device: str) -> Inputs:
    """Random data, W scaled as a trained layer's."""
    torch.manual_seed(0)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": device}
    narrow: dict[str, Any] = {"dtype": dtype, "device": device}
    inputs = Inputs(
        x=torch.randn(m, k, **narrow),
        weight=torch.randn(n, k, **narrow) * k**-0.5,
        scale_out=torch.randn(n, 1, **wide),
        scale_in=torch.randn(groups, 1, k, **wide) * k**-0.5,
        bias=torch.randn(n, **narrow),
        shift=torch.randn(n, **wide),
        dy=torch.randn(m, n, **narrow),
    )
    for t in inputs.trained:
        t.requires_grad_()
    return inputs


def fused(i: Inputs) -> Tensor:
    """This package, on the backend it chooses."""
    return rescaled_linear(i.x, i.weight, i.scale_out, i.scale_in, i.bias, i.shift)


def formula(i: Inputs) -> Tensor:
    """The formula in eager PyTorch by autograd, as the published code and PEFT compute it."""
    return reference.formula(i.x, i.weight, i.scale_out, i.scale_in, i.bias, i.shift)


class _Recompute(torch.autograd.Function):
    """The careful way without kernels: W' written to memory, not kept, and written again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, u, v)
        offset = (bias + shift).to(x.dtype)
        return F.linear(x, reference.rescaled_weight(weight, u, v, x.dtype), offset)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, v = ctx.saved_tensors
        groups, rank, k = v.shape
        dx = dy @ reference.rescaled_weight(weight, u, v, dy.dtype)
        p = ((dy.mT @ x).float() * weight.float()).view(groups, -1, k)
        du = (p @ v.mT).reshape(-1, rank)
        dv = u.view(groups, -1, rank).mT @ p
        return dx, None, du, dv, None, dy.sum(0, dtype=torch.float32)


def recompute(i: Inputs) -> Tensor:
    return _Recompute.apply(i.x, i.weight, i.scale_out, i.scale_in, i.bias, i.shift)


def plain(i: Inputs) -> Tensor:
    """A frozen ``nn.Linear``: another function, and the limit for forward and dx."""
    return F.linear(i.x, i.weight, i.bias)


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "rlrr_kernels": fused,
    "recompute": recompute,
    "formula": formula,
    "plain linear": plain,
}
