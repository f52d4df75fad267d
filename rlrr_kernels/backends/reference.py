"""Both ops in plain PyTorch: the formulas one would write on a board, and the oracle of all tests.

Shapes, everywhere in the package: tokens M, out features N, in features K,
groups G (equal blocks of W's rows with a v each), rank r::

    x [M, K]   weight [N, K]   scale_out u [N, r]   scale_in v [G, r, K]   bias, shift [N]

    S  = 1 + u v                    (within each group)
    W' = weight * S                 in float32, rounded once to x's dtype
    y  = x W'^T + bias + shift      (RLRR, arXiv 2403.19067, Eq. 16 and 20)

    LN(x) = (xhat w + b) s + t      over rows [M, D] with vectors [D] (SSF, arXiv 2210.08823, Eq. 2)

It serves every device and floating dtype, float64 included. As a
backend it forms W' anew in each pass, so none is kept for backward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def scale_matrix(scale_out: Tensor, scale_in: Tensor, dtype: torch.dtype) -> Tensor:
    """S = 1 + u v ``[N, K]`` in ``dtype``; ``u [N, r]``, ``v [G, r, K]``."""
    groups, rank, k = scale_in.shape
    u, v = scale_out.to(dtype).view(groups, -1, rank), scale_in.to(dtype)
    # products by the element, not a matmul, which autocast and PyTorch's settings round to 16 bits or TF32
    product = u[:, :, 0, None] * v[:, 0, None, :]
    for r in range(1, rank):
        product = torch.addcmul(product, u[:, :, r, None], v[:, r, None, :])
    # last, because a small term that is added to 1 loses digits
    return (torch.ones((), dtype=dtype, device=u.device) + product).reshape(scale_out.shape[0], k)


def rescaled_weight(weight: Tensor, scale_out: Tensor, scale_in: Tensor, dtype: torch.dtype) -> Tensor:
    """W' = W * S ``[N, K]``, formed in float32 (float64 for float64) and rounded once to ``dtype``."""
    wide = accumulation_dtype(dtype)
    return (weight.to(wide) * scale_matrix(scale_out, scale_in, wide)).to(dtype)


def formula(
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """The layer by the formula, differentiable by autograd: what the kernels are tested against.

    Autograd keeps W' and W for backward here; that is what the package avoids.
    Works for x of any shape ``[..., K]``; returns ``[..., N]`` in x's dtype.
    """
    y = F.linear(x, rescaled_weight(weight, scale_out, scale_in, x.dtype))
    for term in (bias, shift):
        if term is not None:
            y = y + term
    return y.to(x.dtype)


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """An op runs inside the user's autocast region, which would narrow the products below once more."""
    if x.is_meta:  # which autocast does not know
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def unsupported(x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """It serves everything that validation lets through."""
    return None


def offset_of(bias: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """b + f ``[N]``, rounded once to ``dtype``; None where there is neither."""
    offset = bias if shift is None else shift
    if bias is not None and shift is not None:
        wide = accumulation_dtype(dtype)  # their own dtypes may be narrower than x's
        offset = bias.to(wide) + shift.to(wide)
    return None if offset is None else offset.to(dtype)


def forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """y ``[M, N]`` in x's dtype."""
    offset = offset_of(bias, shift, x.dtype)
    with _without_autocast(x):
        return F.linear(x, rescaled_weight(weight, scale_out, scale_in, x.dtype), offset)


def grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    """dx = dy W' ``[M, K]`` in dy's dtype."""
    with _without_autocast(dy):
        return dy @ rescaled_weight(weight, scale_out, scale_in, dy.dtype)


def grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """du ``[N, r]``, dv ``[G, r, K]`` and df ``[N]`` (``[0]`` unless asked for) in float32 or float64.

    With G = dy^T x and P = G * W:  du = P v^T,  dv = u^T P,  df = sum of dy over the tokens.
    """
    groups, rank, k = scale_in.shape
    wide = accumulation_dtype(x.dtype)
    dy, x = dy.to(wide), x.to(wide)
    with _without_autocast(x):
        p = ((dy.mT @ x) * weight.to(wide)).view(groups, weight.shape[0] // groups, k)
        du = p @ scale_in.to(wide).mT
        dv = scale_out.to(wide).view(groups, -1, rank).mT @ p
    return du.reshape(-1, rank), dv, grad_shift(dy) if need_shift else dy.new_empty(0)


def grad_shift(dy: Tensor) -> Tensor:
    """df = dy ``[M, N]`` summed over the tokens ``[N]``, in float32 or float64, where neither u nor v trains."""
    return dy.sum(0, dtype=accumulation_dtype(dy.dtype))


def grad_weight(dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    """dW = (dy^T x) * S ``[N, K]`` in W's dtype, for a W that trains after all: no pass of a backend."""
    wide = accumulation_dtype(dy.dtype)
    with _without_autocast(dy):
        return ((dy.mT @ x).to(wide) * scale_matrix(scale_out, scale_in, wide)).to(weight.dtype)


def compose_affine(
    weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine and the one behind it as one, ``[D]`` each: (xhat w + b) s + t = xhat (w s) + (b s + t)."""
    scale, shift = scale.to(dtype), shift.to(dtype)
    return (
        scale if weight is None else weight.to(dtype) * scale,
        shift if bias is None else torch.addcmul(shift, bias.to(dtype), scale),
    )


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y ``[M, D]`` in ``dtype``, and mean and 1 / standard deviation ``[M, 1]`` in float32 or float64."""
    wide = accumulation_dtype(x.dtype)
    composed = compose_affine(weight, bias, scale, shift, wide)
    # on a CPU PyTorch's own reads and writes 16 bits and computes in float32; its backward would sum in 16 bits
    given = x if x.device.type == "cpu" and dtype is x.dtype else x.to(wide)
    y, mean, rstd = torch.native_layer_norm(given, x.shape[-1:], *composed, eps)
    return y.to(dtype), mean, rstd


def layer_norm_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    need_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx ``[M, D]`` (None unless asked for), the sum of dy xhat ``[D]`` and the sum of dy ``[D]``."""
    wide = mean.dtype
    composed = scale.to(wide) if weight is None else weight.to(wide) * scale
    # the values of the last vector do not matter, only that there is one
    dx, dy_xhat, dy_sum = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), x.to(wide), x.shape[-1:], mean, rstd, composed, composed, (need_x, True, True)
    )
    return dx.to(x.dtype) if need_x else None, dy_xhat, dy_sum


def affine_gradients(
    dy_xhat: Tensor, dy_sum: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """ds = w sum(dy xhat) + b sum(dy) and dt = sum(dy), ``[D]`` each, of the two sums."""
    ds = dy_xhat if weight is None else dy_xhat * weight.to(dy_xhat.dtype)
    return ds if bias is None else torch.addcmul(ds, dy_sum, bias.to(ds.dtype)), dy_sum


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx ``[M, D]`` in x's dtype (``[0, D]`` unless asked for), ds and dt ``[D]`` in float32 or float64."""
    dx, dy_xhat, dy_sum = layer_norm_sums(dy, x, mean, rstd, weight, scale, need_x)
    return x.new_empty((0, x.shape[1])) if dx is None else dx, *affine_gradients(dy_xhat, dy_sum, weight, bias)
