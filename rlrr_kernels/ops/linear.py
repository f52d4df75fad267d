"""``rescaled_linear``: validation, autocast and the autograd.Function over the three ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlrr_kernels import ops
from rlrr_kernels.backends import reference

_unsafe_view = torch.ops.aten._unsafe_view.default
#: What x, W, u, v, b and f may be stored in.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rescaled_linear(
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """y = x (W * (1 + u v))^T + b + f without writing the rescaled weight to memory.

    The layer of RLRR (arXiv 2403.19067, Eq. 16 and 20). All arguments may need
    gradients; what nobody needs is not computed, and only x and references to
    the parameters are kept for backward. Higher derivatives are right, in plain PyTorch.
    So are the transforms of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ``hessian`` and the rest)
    and forward-mode AD, by the plain formula: under these nothing is fused, and W' is formed and kept.

    Args:
        x: ``[..., K]``, one dimension or more, any strides. Its dtype is the dtype
            of the product and of the result; under autocast that is autocast's.
        weight: W ``[N, K]``, any floating dtype (float64 only together with x).
        scale_out: u ``[N]`` or ``[N, 1]``, any floating dtype.
        scale_in: v ``[K]``, ``[1, K]``, or ``[groups, 1, K]`` where the rows of W
            form ``groups`` equal blocks with a v each, as in a fused qkv.
        bias: b ``[N]``, or None.
        shift: f ``[N]``, or None.

    Returns:
        y ``[..., N]`` in x's dtype. 1 + u v and its product with W are formed in
        float32 and rounded once; sums are in float32 (float64 for float64).

    Raises:
        TypeError: an argument is no tensor, or of a dtype that does not fit.
        ValueError: an argument has a shape or a device that does not fit.
    """
    if not _fits(x, weight, scale_out, scale_in, bias, shift):
        _validate(x, weight, scale_out, scale_in, bias, shift)
    if type(weight) not in ops.PLAIN and hasattr(weight, "device_mesh"):
        from rlrr_kernels.layers import parallel  # whoever has a DTensor has imported what this does

        return parallel.sharded_linear(x, weight, scale_out, scale_in, bias, shift)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if ops.transformed() or ops.recorded_for_others():
        return reference.forward(x, weight, *_canonical(scale_out, scale_in), bias, shift)
    return _RescaledLinear.apply(x, weight, scale_out, scale_in, bias, shift)  # type: ignore[no-any-return]


class _RescaledLinear(torch.autograd.Function):
    """Shapes as :func:`rescaled_linear` takes them; the ops see ``[M, K]``, ``[N, r]``, ``[G, r, K]``."""

    # one forward with ctx: a separate setup_context costs tens of microseconds a call
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale_out: Tensor,
        scale_in: Tensor,
        bias: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        _save(ctx, (x, weight, scale_out, scale_in, bias, shift))
        u, v = _canonical(scale_out, scale_in)
        rows = ops.rows(x)
        if ops.unobserved(x, weight, scale_out, scale_in, bias, shift):
            y = ops.backend("forward", x, weight, scale_in).forward(rows, weight, u, v, bias, shift)
            # y is new and no one else's; a view made in here could not be changed in place, as callers of nn.Linear do
            return y if x.dim() == 2 else y.resize_(*x.shape[:-1], weight.shape[0])
        y = ops.forward(rows, weight, u, v, bias, shift)
        return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale_out, scale_in = ctx.saved_tensors
        x_needs, weight_needs, u_needs, v_needs, bias_needs, shift_needs = ctx.needs_input_grad
        u, v = _canonical(scale_out, scale_in)
        dy = ops.rows(grad)
        # None: whichever backend serves the pass
        by: Any = None
        if ops.in_plain_torch(grad):
            by = reference
        elif not ops.unobserved(dy, x, weight, scale_out, scale_in):
            by = ops
        dx = dw = du = dv = df = None
        if x_needs:
            dx = (by or ops.backend("grad_input", dy, weight, v)).grad_input(dy, weight, u, v)
            dx = dx if len(ctx.x_shape) == 2 else dx.view(ctx.x_shape)
        if u_needs or v_needs or bias_needs or shift_needs:
            passes = by or ops.backend("grad_scales", dy, weight, v)
            if u_needs or v_needs:
                du, dv, df = passes.grad_scales(dy, ops.rows(x), weight, u, v, bias_needs or shift_needs)
            else:
                df = passes.grad_shift(dy)
        if weight_needs:
            # a trained W gets a gradient of its own size, and so does this
            dw = reference.grad_weight(dy, ops.rows(x), weight, u, v)
        return (
            dx,
            dw,
            _like(du, scale_out.shape, scale_out.dtype) if u_needs else None,
            _like(dv, scale_in.shape, scale_in.dtype) if v_needs else None,
            _like(df, None, ctx.bias_dtype) if bias_needs else None,
            _like(df, None, ctx.shift_dtype) if shift_needs else None,
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any = None) -> None:
    x, weight, scale_out, scale_in, bias, shift = inputs
    _, weight_needs, u_needs, v_needs, *_ = ctx.needs_input_grad
    # x serves the gradients of W, u and v alone
    ctx.save_for_backward(x if weight_needs or u_needs or v_needs else None, weight, scale_out, scale_in)
    ctx.x_shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.shift_dtype = None if shift is None else shift.dtype


def _op(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """``rlrr::forward`` where it is called as an op, as exported programs do: differentiated and transformed too."""
    given = x, weight, scale_out, scale_in, bias, shift
    if ops.transformed():
        return reference.forward(*given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _RescaledLinear.apply(*given)  # type: ignore[no-any-return]
    if ops.unobserved(*given):  # what the dispatcher would end at, one Python call earlier
        return ops.backend("forward", x, weight, scale_in).forward(*given)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return ops.forward(*given)


if hasattr(torch._C, "_AutoDispatchBelowAutograd"):
    ops._library.impl("forward", _op, "Autograd")
else:  # what torch promises to keep, tens of microseconds slower
    torch.library.register_autograd("rlrr::forward", _RescaledLinear.backward, setup_context=_save, lib=ops._library)


def _like(grad: Tensor | None, shape: torch.Size | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in the shape and dtype of its parameter; calls that change nothing cost a microsecond each."""
    if grad is None:
        return None
    if shape is not None and grad.shape != shape:
        grad = grad.view(shape)
    return grad if grad.dtype is dtype else grad.to(dtype)


def _canonical(scale_out: Tensor, scale_in: Tensor) -> tuple[Tensor, Tensor]:
    """u as ``[N, r]`` and v as ``[groups, r, K]``."""
    u = scale_out if scale_out.dim() == 2 else scale_out.unsqueeze(1)
    return u, scale_in if scale_in.dim() == 3 else scale_in.view(1, 1, scale_in.shape[-1])


def _fits(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> bool:
    """Whether these are the arguments that a layer passes, found fast; if not, :func:`_validate` looks closely."""
    given = (x, weight, scale_out, scale_in)
    if bias is not None:
        given += (bias,)  # type: ignore[assignment]
    if shift is not None:
        given += (shift,)  # type: ignore[assignment]
    device = x.device if isinstance(x, Tensor) else None
    for t in given:
        if not isinstance(t, Tensor) or t.dtype not in FLOATS or t.device != device:
            return False
    if weight.dim() != 2 or x.dim() == 0 or (x.dtype is torch.float64) != (weight.dtype is torch.float64):
        return False
    n, k = weight.shape
    v_shape = scale_in.shape
    return (
        x.shape[-1] == k
        and scale_out.shape == (n, 1)
        and v_shape[-1] == k
        and (v_shape == (1, k) or (len(v_shape) == 3 and v_shape[1] == 1 and v_shape[0] > 0 and n % v_shape[0] == 0))
        and (bias is None or bias.shape == (n,))
        and (shift is None or shift.shape == (n,))
    )


def _validate(
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
) -> None:
    required = {"x": x, "weight": weight, "scale_out": scale_out, "scale_in": scale_in}
    optional = {"bias": bias, "shift": shift}
    given = required | {name: t for name, t in optional.items() if t is not None}
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} as x, got {t.device}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected shape [..., {k}] for weight [{n}, {k}], got {list(x.shape)}")
    if (x.dtype is torch.float64) != (weight.dtype is torch.float64):
        raise TypeError(f"weight: float64 goes with float64 only, got {weight.dtype} with x of {x.dtype}")
    if scale_out.shape[:1] != (n,) or scale_out.dim() > 2:
        raise ValueError(f"scale_out: expected shape [{n}] or [{n}, 1], got {list(scale_out.shape)}")
    if not 1 <= scale_in.dim() <= 3 or scale_in.shape[-1] != k:
        raise ValueError(f"scale_in: expected shape [{k}], [1, {k}] or [groups, 1, {k}], got {list(scale_in.shape)}")
    ranks = {"scale_out": scale_out.shape[1] if scale_out.dim() == 2 else 1}
    ranks["scale_in"] = scale_in.shape[-2] if scale_in.dim() > 1 else 1
    for name, rank in ranks.items():
        if rank != 1:
            raise ValueError(f"{name}: expected rank 1, got rank {rank} (shape {list(given[name].shape)})")
    groups = scale_in.shape[0] if scale_in.dim() == 3 else 1
    if groups < 1 or n % groups:
        raise ValueError(f"scale_in: expected a number of groups that divides N = {n}, got {groups}")
    for name, term in optional.items():
        if term is not None and term.shape != (n,):
            raise ValueError(f"{name}: expected shape [{n}], got {list(term.shape)}")
