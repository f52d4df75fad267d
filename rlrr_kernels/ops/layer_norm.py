"""LayerNorm with an affine behind it as an op: y = (xhat w + b) s + t, its autograd.Function and its passes.

The ops ``rlrr::layer_norm`` and ``rlrr::layer_norm_backward`` take rows ``[M, D]``; w, b, s and t are ``[D]``.
The affine is SSF's (arXiv 2210.08823, Eq. 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rlrr_kernels.backends import choice, reference
from rlrr_kernels.backends.reference import accumulation_dtype
from rlrr_kernels.ops import route

_unsafe_view = torch.ops.aten._unsafe_view.default


def check(x: Tensor, scale: Tensor) -> None:
    """Check the rows that an affine of scale ``[D]`` is applied to.

    Raises:
        TypeError: If x is not a floating-point tensor.
        ValueError: If x's last dimension is not D, or x is on another device.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {given}")
    if scale.device != x.device:
        raise ValueError(f"ssf_scale: expected device {x.device} as x, got {scale.device}")
    if x.dim() == 0 or x.shape[-1] != scale.shape[0]:
        raise ValueError(f"x: expected shape [..., {scale.shape[0]}], got {list(x.shape)}")


def affine_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Compute y = (xhat w + b) s + t, where xhat is x normalised over its last dimension.

    Args:
        x: ``[..., D]``, checked by :func:`check`. float64 goes with float64 parameters only.
        weight, bias: w and b ``[D]``, or None.
        scale, shift: s and t ``[D]``.
        eps: added to the variance.
        dtype: of the result.

    Returns:
        y ``[..., D]``, computed in float32 (float64 for float64) and rounded once to ``dtype``.
    """
    sharding = route.sharding_of(x)
    if sharding is not None:
        parameters = weight, bias, scale, shift
        return sharding.layer_norm(affine_layer_norm, x, parameters, eps, dtype)  # type: ignore[no-any-return]
    wide = accumulation_dtype(x.dtype)
    if torch.compiler.is_compiling() or route.needs_plain_forward():
        composed = reference.compose_affine(weight, bias, scale, shift, wide)
        # the shape of s, not of x: for an ONNX exporter x may have any
        return F.layer_norm(x.to(wide), scale.shape, *composed, eps).to(dtype)
    return _AffineLayerNorm.apply(x, weight, bias, scale, shift, eps, dtype)  # type: ignore[no-any-return]


class _AffineLayerNorm(torch.autograd.Function):
    """Keeps x and two numbers for each row, as LayerNorm does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        passes = _passes(x, weight, bias, scale, shift)
        y, mean, rstd = passes.layer_norm(route.flatten_tokens(x), weight, bias, scale, shift, eps, dtype)
        ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
        ctx.eps, ctx.dtype = eps, dtype
        # not view: callers of nn.LayerNorm change y in place, which a view made in here would forbid
        return y if x.dim() == 2 else _unsafe_view(y, x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
        x_needs, weight_needs, bias_needs, scale_needs, shift_needs, *_ = ctx.needs_input_grad
        dy, rows = route.flatten_tokens(grad), route.flatten_tokens(x)
        dx = dw = db = ds = dt = None
        # plain PyTorch also where w or b trains after all: the kernels have no gradients of these
        if route.needs_plain_backward(grad) or weight_needs or bias_needs:
            wide = mean.dtype
            dx, dy_xhat, dy_sum = reference.layer_norm_sums(dy, rows, mean, rstd, weight, scale, x_needs)
            if weight_needs:
                dw = (dy_xhat * scale.to(wide)).to(weight.dtype)
            if bias_needs:
                db = (dy_sum * scale.to(wide)).to(bias.dtype)
            ds, dt = reference.affine_gradients(dy_xhat, dy_sum, weight, bias)
        else:
            passes = _passes(dy, x, weight, bias, scale)
            dx, ds, dt = passes.layer_norm_backward(dy, rows, mean, rstd, weight, bias, scale, x_needs)
        return (
            dx.view(x.shape) if dx is not None and x_needs else None,
            dw,
            db,
            ds.to(scale.dtype) if scale_needs else None,
            dt.to(shift.dtype) if shift_needs else None,
            None,
            None,
        )


def _passes(x: Tensor, *others: Tensor | None) -> Any:
    """The backend that serves x ``[..., D]``, or the registered ops where someone watches."""
    return choice.module_for_layer_norm(x) if route.can_skip_dispatcher(x, *others) else torch.ops.rlrr


def arguments_of(node: Any) -> tuple[Callable[..., Tensor], tuple[Tensor | None, ...]] | None:
    """Return the function and the tensors that give again what a node of autograd's graph is the derivative of.

    Returns:
        The function, and the tensors that it takes; None for a node of another operation, for one whose tensors are
        packed by hooks, and if a parameter is freed until backward (FSDP2, which gathers it for that node alone).

    Raises:
        RuntimeError: If a backward pass has freed the node's tensors, or one was changed in place.
    """
    own: Any = _AffineLayerNorm
    if not isinstance(node, own._backward_cls) or any(map(route.is_packed, node._raw_saved_tensors)):
        return None
    x, _, _, *parameters = node.saved_tensors
    if any(p is not None and not p.untyped_storage().size() for p in parameters):
        return None
    return functools.partial(affine_layer_norm, eps=node.eps, dtype=node.dtype), (x, *parameters)


route.LIBRARY.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
route.LIBRARY.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor scale,"
    " bool need_x) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

layer_norm = torch.ops.rlrr.layer_norm.default
layer_norm_backward = torch.ops.rlrr.layer_norm_backward.default


def _layer_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return choice.module_for_layer_norm(x).layer_norm(x, *rest)  # type: ignore[no-any-return]


def _layer_norm_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return choice.module_for_layer_norm(x).layer_norm_backward(dy, x, *rest)  # type: ignore[no-any-return]


route.LIBRARY.impl("layer_norm", _layer_norm, "CompositeExplicitAutograd")
route.LIBRARY.impl("layer_norm_backward", _layer_norm_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rlrr::layer_norm", lib=route.LIBRARY)
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], 1), dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=dtype), mean, torch.empty_like(mean)


@torch.library.register_fake("rlrr::layer_norm_backward", lib=route.LIBRARY)
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ds = x.new_empty(scale.shape, dtype=mean.dtype)
    return x.new_empty((x.shape[0] if need_x else 0, x.shape[1])), ds, torch.empty_like(ds)
