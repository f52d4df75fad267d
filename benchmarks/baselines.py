"""The layer as published, and the fastest ways to compute it and its gradients without this package's kernels.

On a GPU ``torch.compile`` makes one kernel of the elementwise work of the latter: eager PyTorch would write every step
of it to memory, and being faster than that would show nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")


def weight_by_autograd(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return W' = W * (1 + u v) ``[N, K]`` by plain operations, in the dtype that they promote to."""
    groups, rank, _ = v.shape
    u = u.view(groups, -1, rank)
    if rank == 1:
        product = u * v
    else:
        with torch.autocast(u.device.type, enabled=False):  # which would round the product of u and v
            product = u @ v
    return weight * (1 + product).view(weight.shape)


def formula(x: Tensor, weight: Tensor, u: Tensor, v: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """Compute the layer as the published code does: one linear with both biases; autograd keeps W' in x's dtype."""
    return F.linear(x, weight_by_autograd(weight, u, v).to(x.dtype), (bias + shift).to(x.dtype))


@functools.cache
def compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    """Compile a function; too many recompilations are an error, and do not fall back to eager PyTorch."""
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


def one_kernel(function: Callable[..., T]) -> Callable[..., T]:
    """Compile an elementwise function for CUDA tensors; its first argument decides."""

    @functools.wraps(function)
    def call(first: Tensor, *others: Any) -> T:
        if first.is_cuda and not torch.compiler.is_compiling():
            return compiled(function)(first, *others)  # type: ignore[no-any-return]
        return function(first, *others)

    return call


@one_kernel
def rescaled_weight(weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W' ``[N, K]`` with the fewest passes over memory in eager PyTorch: S, the product in place, rounding."""
    groups, rank, k = v.shape
    u = u.view(groups, -1, rank)
    if rank == 1:
        scale = torch.addcmul(torch.ones((), device=u.device, dtype=u.dtype), u, v)
    else:
        scale = (u @ v).add_(1)
    return scale.view(-1, k).mul_(weight).to(dtype)


@one_kernel
def _reduced(g: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return du ``[N, r]`` and dv ``[groups, r, K]`` from G = dy^T x ``[N, K]``."""
    groups, rank, k = v.shape
    wide, u = g.to(u.dtype), u.view(groups, -1, rank)
    if rank == 1 and torch.compiler.is_compiling():  # the compiler fuses sums with what they read, but not products
        p = (wide * weight).view(groups, -1, k)
        return (p * v).sum(2).view(-1, 1), (p * u).sum(1, keepdim=True)
    p = wide.mul_(weight).view(groups, -1, k)
    return (p @ v.mT).view(-1, rank), u.mT @ p


class Recompute(torch.autograd.Function):
    """The layer without kernels and without keeping W': it is written to memory in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, u, v)
        return F.linear(x, rescaled_weight(weight, u, v, x.dtype), (bias + shift).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, v = ctx.saved_tensors
        dx = dy @ rescaled_weight(weight, u, v, dy.dtype)
        # G is rounded to x's dtype here; the package does not round it
        du, dv = _reduced(dy.mT @ x, weight, u, v)
        return dx, None, du, dv, None, dy.sum(0, dtype=u.dtype)


@one_kernel
def _scaled_groups(x: Tensor, v: Tensor) -> Tensor:
    """Return x * v of each group, ``[groups, M, K]`` in x's dtype."""
    return (x * v).to(x.dtype)


@one_kernel
def _scaled_columns(dy: Tensor, u: Tensor) -> Tensor:
    """Return dy * u^T ``[M, N]`` in dy's dtype."""
    return (dy * u.mT).to(dy.dtype)


@one_kernel
def _summed(plain: Tensor, z: Tensor, u: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
    """Return y ``[M, N]`` from x W^T and z."""
    return torch.addcmul(plain + (bias + shift), z, u.mT).to(plain.dtype)


@one_kernel
def _input_grads(plain: Tensor, t: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx ``[M, K]`` from dy W and t ``[groups, M, K]``, and dv ``[groups, 1, K]``."""
    dx = (plain + (t * v).sum(0)).to(plain.dtype)
    return dx, (t.to(v.dtype) * x).sum(1, keepdim=True)


@one_kernel
def _output_grads(dy: Tensor, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return du ``[N, 1]`` and df ``[N]``."""
    wide = dy.to(u.dtype)
    return (wide * z).sum(0).unsqueeze(1), wide.sum(0)


class Factored(torch.autograd.Function):
    """The layer without W': y = x W^T + z * u + b + f with z = (x * v) W^T, two products more than a plain layer.

    With t = (dy * u) W: dx = dy W + v * t, dv = sum of x * t and du = sum of dy * z over tokens, so backward needs no
    dy^T x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, u: Tensor, v: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        groups = len(v)
        blocks = weight.view(groups, -1, weight.shape[1])
        scaled = _scaled_groups(x, v)
        if groups == 1:
            z = scaled[0] @ weight.mT
        else:
            z = x.new_empty(len(x), len(weight))
            # each group's product lands in its columns, not in a batch that would have to be transposed
            for columns, rows, block in zip(z.chunk(groups, 1), scaled, blocks, strict=True):
                torch.mm(rows, block.mT, out=columns)
        ctx.save_for_backward(x, weight, u, v, z)
        return _summed(x @ weight.mT, z, u, bias, shift)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, v, z = ctx.saved_tensors
        groups = len(v)
        scaled = _scaled_columns(dy, u).view(len(dy), groups, -1).transpose(0, 1)
        t = scaled @ weight.view(groups, -1, weight.shape[1])
        dx, dv = _input_grads(dy @ weight, t, x, v)
        du, df = _output_grads(dy, z, u)
        return dx, None, du, dv, None, df
