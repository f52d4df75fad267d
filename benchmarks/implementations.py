"""What is compared: this package, and how else one would compute the layer in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlrr_kernels import ops, reference, rescaled_linear

#: ViT-B/16: tokens of one image, and (N, K, groups) of the four linears of a block
TOKENS = 197
LAYERS = {
    "qkv": (2304, 768, 3),
    "proj": (768, 768, 1),
    "fc1": (3072, 768, 1),
    "fc2": (768, 3072, 1),
}


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


def _rescaled_weight(weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """W' with as few passes over memory as PyTorch allows: one for S, one in place for the product."""
    groups, _, k = v.shape
    one = torch.ones((), device=u.device)
    scale = torch.addcmul(one, u.view(groups, -1, 1), v).view(-1, k)
    return scale.mul_(weight).to(dtype)


class _Recompute(torch.autograd.Function):
    """The careful way without kernels: W' written to memory, not kept, and written again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, u, v)
        return F.linear(x, _rescaled_weight(weight, u, v, x.dtype), (bias + shift).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, v = ctx.saved_tensors
        groups, rank, k = v.shape
        dx = dy @ _rescaled_weight(weight, u, v, dy.dtype)
        # G is rounded to x's dtype here, which the package does not do
        p = (dy.mT @ x).float().mul_(weight).view(groups, -1, k)
        du = (p @ v.mT).reshape(-1, rank)
        dv = u.view(groups, -1, rank).mT @ p
        return dx, None, du, dv, None, dy.sum(0, dtype=torch.float32)


def recompute(i: Inputs) -> Tensor:
    return _Recompute.apply(i.x, i.weight, i.scale_out, i.scale_in, i.bias, i.shift)


def plain(i: Inputs) -> Tensor:
    """A frozen ``nn.Linear``: another function, and the limit for forward and dx."""
    return F.linear(i.x, i.weight, i.bias)


def products(i: Inputs) -> tuple[Tensor, ...]:
    """The layer's three products alone, W as it is: x W^T, dy W and dy^T x in x's dtype."""
    x, dy = i.x.detach(), i.dy
    return x @ i.weight.mT, dy @ i.weight, dy.mT @ x


def three_ops(i: Inputs) -> tuple[Tensor, ...]:
    """The package's ops alone: no module, no validation, no autograd."""
    x, u, v, f = (t.detach() for t in i.trained)
    scales = (i.weight, u, v)
    y, dx = ops.forward(x, *scales, i.bias, f), ops.grad_input(i.dy, *scales)
    return y, dx, *ops.grad_scales(i.dy, x, *scales, True)


def step(i: Inputs, implementation: Callable[[Inputs], Tensor]) -> tuple[Tensor, ...]:
    """y and the gradients of what is trained; of x alone for the plain linear."""
    y = implementation(i)
    trained = (i.x,) if implementation is plain else i.trained
    return (y.detach(), *torch.autograd.grad(y, trained, i.dy))


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {
    "rlrr_kernels": fused,
    "recompute": recompute,
    "formula": formula,
    "plain linear": plain,
}
