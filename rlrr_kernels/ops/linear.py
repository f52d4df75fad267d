"""The rescaled linear layer as an op: its validation, its autograd.Function, and the registered passes.

The four ops ``rlrr::forward``, ``rlrr::grad_input``, ``rlrr::grad_scales`` and ``rlrr::grad_shift`` take x and dy as
``[M, K]`` and ``[M, N]``, u as ``[N, r]`` and v as ``[groups, r, K]``. The backend is chosen when an op runs, behind
the dispatcher (:mod:`rlrr_kernels.backends.choice`), so ``torch.compile`` neither sees nor guards on the choice.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels.backends import choice, reference
from rlrr_kernels.backends.problem import MAX_RANK, Pass
from rlrr_kernels.backends.reference import accumulation_dtype
from rlrr_kernels.ops import recompute, route

_unsafe_view = torch.ops.aten._unsafe_view.default

#: The dtypes that x, W, u, v, b and f may have.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_NAMES = ("x", "weight", "scale_out", "scale_in", "bias", "shift")


def rescaled_linear(
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Compute y = x (W * (1 + u v))^T + b + f without writing the rescaled weight to memory.

    The layer of RLRR (arXiv 2403.19067, Eq. 16 and 20). Every argument may require a gradient; gradients that nobody
    needs are not computed, and only x and references to the parameters are kept for backward. Second derivatives,
    the transforms of ``torch.func`` (``vmap``, ``grad``, ``jvp``, ``hessian``, ...) and forward-mode AD are correct
    too, by the plain formula: there nothing is fused, and W' is formed and kept.

    Args:
        x: ``[..., K]``, at least one dimension, any strides. Its dtype is the dtype of the product and of the
            result. Under autocast, autocast's dtype is used instead.
        weight: W ``[N, K]``, any floating dtype (float64 only together with x).
        scale_out: u ``[N, r]`` with a rank r from 1 to 128, or ``[N]`` for rank 1, any floating dtype.
        scale_in: v ``[r, K]``, or ``[K]`` for rank 1, or ``[groups, r, K]`` if the rows of W form ``groups`` equal
            blocks, each with its own v, as in a fused qkv projection.
        bias: b ``[N]``, or None.
        shift: f ``[N]``, or None.

    Returns:
        y ``[..., N]`` in x's dtype. 1 + u v and its product with W are formed in float32 and rounded once. Sums are
        in float32, except where cuBLAS multiplies (ranks above 4 on GPUs). With float64 tensors everything is float64.

    Raises:
        TypeError: If an argument is not a tensor, or its dtype is not supported, or x is nested.
        ValueError: If an argument's shape or device does not fit the others.
    """
    check(x, weight, scale_out, scale_in, bias, shift)
    sharding = route.sharding_of(weight)
    if sharding is not None:
        return sharding.linear(rescaled_linear, x, weight, scale_out, scale_in, bias, shift)  # type: ignore[no-any-return]
    origin = recompute.origin(x)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if route.needs_plain_forward():
        return reference.forward(x, weight, *_as_matrices(scale_out, scale_in), bias, shift)
    return _RescaledLinear.apply(x, weight, scale_out, scale_in, bias, shift, origin)  # type: ignore[no-any-return]


def check(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> None:
    """Check the arguments of :func:`rescaled_linear`; it takes 2 to 3 microseconds, so it names them only in errors.

    Raises:
        TypeError, ValueError: As :func:`rescaled_linear`.
    """
    device = x.device if isinstance(x, Tensor) else None
    for i, t in enumerate((x, weight, scale_out, scale_in, bias, shift)):
        if t is None and i > 3:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{_NAMES[i]}: expected a tensor, got {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise TypeError(f"{_NAMES[i]}: expected float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.device != device:
            raise ValueError(f"{_NAMES[i]}: expected device {device} as x, got {t.device}")
    if x.is_nested:
        raise TypeError("x: expected a dense tensor, got a nested one; pass x.values()")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [N, K], got {list(weight.shape)}")
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x: expected shape [..., {k}] for weight [{n}, {k}], got {list(x.shape)}")
    if (x.dtype is torch.float64) != (weight.dtype is torch.float64):
        raise TypeError(f"weight: float64 goes with float64 only, got {weight.dtype} with x of {x.dtype}")
    u, v, rank = scale_out.shape, scale_in.shape, 1
    if u != (n, 1) and u != (n,):
        if len(u) != 2 or u[0] != n:
            raise ValueError(f"scale_out: expected shape [{n}] or [{n}, r], got {list(u)}")
        rank = u[1]
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"scale_out: expected a rank from 1 to {MAX_RANK}, got rank {rank} (shape {list(u)})")
    if v != (rank, k) and (rank > 1 or v != (k,)):
        if not 2 <= len(v) <= 3 or v[-1] != k:
            alone = f"[{k}], " if rank == 1 else ""
            raise ValueError(f"scale_in: expected shape {alone}[{rank}, {k}] or [groups, {rank}, {k}], got {list(v)}")
        if v[-2] != rank:
            raise ValueError(f"scale_in: expected rank {rank} as scale_out, got rank {v[-2]} (shape {list(v)})")
        if v[0] < 1 or n % v[0]:
            raise ValueError(f"scale_in: expected a number of groups that divides N = {n}, got {v[0]}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias: expected shape [{n}], got {list(bias.shape)}")
    if shift is not None and shift.shape != (n,):
        raise ValueError(f"shift: expected shape [{n}], got {list(shift.shape)}")


class _RescaledLinear(torch.autograd.Function):
    """Shapes as :func:`rescaled_linear` takes them; the ops and backends see ``[M, K]``, ``[N, r]``, ``[G, r, K]``."""

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
        origin: recompute.Origin | None = None,
    ) -> Tensor:
        _save(ctx, (x, weight, scale_out, scale_in, bias, shift), origin=origin)
        u, v = _as_matrices(scale_out, scale_in)
        tokens = route.flatten_tokens(x)
        if route.can_skip_dispatcher(x, weight, scale_out, scale_in, bias, shift):
            y = _backend("forward", x, weight, v).forward(tokens, weight, u, v, bias, shift)
            # resize_, not view: callers of nn.Linear change y in place, which a view made in here would forbid
            return y if x.dim() == 2 else y.resize_(*x.shape[:-1], weight.shape[0])
        y = forward(tokens, weight, u, v, bias, shift)
        return y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale_out, scale_in, *origin = ctx.saved_tensors
        x_needs, weight_needs, u_needs, v_needs, bias_needs, shift_needs, *_ = ctx.needs_input_grad
        if origin:
            operation, result, dtype = ctx.origin
            x = recompute.again(operation, result, dtype, origin)
        u, v = _as_matrices(scale_out, scale_in)
        dy = route.flatten_tokens(grad)
        # None: the backend that is chosen for each pass
        passes: Any = None
        if route.needs_plain_backward(grad):
            passes = reference
        elif not route.can_skip_dispatcher(dy, x, weight, scale_out, scale_in):
            passes = torch.ops.rlrr
        dx = dw = du = dv = df = None
        if x_needs:
            dx = (passes or _backend("grad_input", dy, weight, v)).grad_input(dy, weight, u, v)
            dx = dx if len(ctx.x_shape) == 2 else dx.view(ctx.x_shape)
        if u_needs or v_needs or bias_needs or shift_needs:
            passes = passes or _backend("grad_scales", dy, weight, v)
            if u_needs or v_needs:
                tokens = route.flatten_tokens(x)
                du, dv, df = passes.grad_scales(dy, tokens, weight, u, v, bias_needs or shift_needs)
            else:
                df = passes.grad_shift(dy)
        if weight_needs:
            # a W that trains gets a gradient of its own size in any case
            dw = reference.grad_weight(dy, route.flatten_tokens(x), weight, u, v)
        return (
            dx,
            dw,
            _like(du, scale_out.shape, scale_out.dtype) if u_needs else None,
            _like(dv, scale_in.shape, scale_in.dtype) if v_needs else None,
            _like(df, None, ctx.bias_dtype) if bias_needs else None,
            _like(df, None, ctx.shift_dtype) if shift_needs else None,
            None,
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any = None, origin: recompute.Origin | None = None) -> None:
    x, weight, scale_out, scale_in, bias, shift = inputs
    _, weight_needs, u_needs, v_needs, *_ = ctx.needs_input_grad
    # only the gradients of W, u and v need x
    if not (weight_needs or u_needs or v_needs):
        ctx.save_for_backward(None, weight, scale_out, scale_in)
    elif origin is None:
        ctx.save_for_backward(x, weight, scale_out, scale_in)
    else:
        ctx.save_for_backward(None, weight, scale_out, scale_in, *origin.tensors)
        ctx.origin = origin.operation, origin.result, x.dtype
    ctx.x_shape = x.shape
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.shift_dtype = None if shift is None else shift.dtype


def _like(grad: Tensor | None, shape: torch.Size | None, dtype: torch.dtype) -> Tensor | None:
    """A gradient in its parameter's shape and dtype; a call that changes nothing would cost a microsecond."""
    if grad is None:
        return None
    if shape is not None and grad.shape != shape:
        grad = grad.view(shape)
    return grad if grad.dtype is dtype else grad.to(dtype)


def _as_matrices(scale_out: Tensor, scale_in: Tensor) -> tuple[Tensor, Tensor]:
    """u as ``[N, r]`` and v as ``[groups, r, K]``."""
    u = scale_out if scale_out.dim() == 2 else scale_out.unsqueeze(1)
    if scale_in.dim() == 3:
        return u, scale_in
    return u, (scale_in if scale_in.dim() == 2 else scale_in.unsqueeze(0)).unsqueeze(0)


def _backend(kernel: Pass, tokens: Tensor, weight: Tensor, scale_in: Tensor | None = None) -> ModuleType:
    """The module whose pass serves x or dy ``[..., K]``, W and v ``[groups, r, K]``, if the pass takes v."""
    # a product with an empty side has no work for a kernel, only a shape and zeros
    if tokens.numel() == 0 or weight.numel() == 0:
        return reference
    groups, rank, _ = (1, 1, 0) if scale_in is None else scale_in.shape
    return choice.module_for(kernel, tokens, weight, tokens.numel() // tokens.shape[-1], groups, rank)


def _check_op(
    tokens: Tensor, columns: int, weight: Tensor, scale_out: Tensor, scale_in: Tensor, *vectors: Tensor | None
) -> None:
    """Check shapes and devices for a caller of a registered op, who has not passed :func:`check`: kernels trust them.

    Raises:
        ValueError: If they do not fit.
    """
    n, k = weight.shape
    u, v, device = scale_out.shape, scale_in.shape, tokens.device
    if weight.device != device or scale_out.device != device or scale_in.device != device:
        raise ValueError(
            f"rlrr op: expected one device, got {device}, {weight.device}, {scale_out.device}, {scale_in.device}"
        )
    if (
        tokens.shape[1:] != (columns,)
        or len(v) != 3
        or u != (n, v[1])
        or v[2] != k
        or not 1 <= v[1] <= MAX_RANK
        or v[0] < 1
        or n % v[0]
        or any(t is not None and (t.shape != (n,) or t.device != device) for t in vectors)
    ):
        given = [None if t is None else list(t.shape) for t in (tokens, weight, scale_out, scale_in, *vectors)]
        raise ValueError(
            f"rlrr op: expected [M, {columns}] with weight [{n}, {k}], scale_out [{n}, r], scale_in [groups, r, {k}] "
            f"where r is 1 to {MAX_RANK} and groups divides {n}, and vectors [{n}], got {given}"
        )


route.LIBRARY.define(
    "forward(Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, Tensor? bias, Tensor? shift) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
route.LIBRARY.define(
    "grad_input(Tensor dy, Tensor weight, Tensor scale_out, Tensor scale_in) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
route.LIBRARY.define(
    "grad_scales(Tensor dy, Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, bool need_shift)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
route.LIBRARY.define("grad_shift(Tensor dy) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

forward = torch.ops.rlrr.forward.default
grad_input = torch.ops.rlrr.grad_input.default
grad_scales = torch.ops.rlrr.grad_scales.default
grad_shift = torch.ops.rlrr.grad_shift.default


def _forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    _check_op(x, weight.shape[1], weight, scale_out, scale_in, bias, shift)
    return _backend("forward", x, weight, scale_in).forward(x, weight, scale_out, scale_in, bias, shift)


def _grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    _check_op(dy, weight.shape[0], weight, scale_out, scale_in)
    return _backend("grad_input", dy, weight, scale_in).grad_input(dy, weight, scale_out, scale_in)


def _grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check_op(x, weight.shape[1], weight, scale_out, scale_in)
    if (dy.shape, dy.dtype, dy.device) != ((x.shape[0], weight.shape[0]), x.dtype, x.device):
        raise ValueError(
            f"rlrr op: expected dy [{x.shape[0]}, {weight.shape[0]}] of {x.dtype} on {x.device}, got "
            f"{list(dy.shape)} of {dy.dtype} on {dy.device}"
        )
    return _backend("grad_scales", x, weight, scale_in).grad_scales(dy, x, weight, scale_out, scale_in, need_shift)


def _grad_shift(dy: Tensor) -> Tensor:
    if dy.dim() != 2:
        raise ValueError(f"rlrr op: expected dy [M, N], got {list(dy.shape)}")
    # W is only asked for its device and dtype
    return _backend("grad_scales", dy, dy).grad_shift(dy)


def _forward_above_autograd(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """``rlrr::forward`` when it is called as an op, as exported programs do: it is differentiated and transformed."""
    given = x, weight, scale_out, scale_in, bias, shift
    if route.is_transformed():
        return reference.forward(*given)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        _check_op(x, weight.shape[1], weight, scale_out, scale_in, bias, shift)
        return _RescaledLinear.apply(*given)  # type: ignore[no-any-return]
    if route.can_skip_dispatcher(*given):  # what the dispatcher would end at, one Python call earlier
        return _forward(*given)
    with route.BelowAutograd():
        return forward(*given)


route.LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
route.LIBRARY.impl("grad_input", _grad_input, "CompositeExplicitAutograd")
route.LIBRARY.impl("grad_scales", _grad_scales, "CompositeExplicitAutograd")
route.LIBRARY.impl("grad_shift", _grad_shift, "CompositeExplicitAutograd")
if route.BelowAutograd is not None:
    route.LIBRARY.impl("forward", _forward_above_autograd, "Autograd")
else:  # the public way, tens of microseconds slower
    torch.library.register_autograd(
        "rlrr::forward",
        lambda ctx, grad: _RescaledLinear.backward(ctx, grad)[:-1],  # the op has no ``origin``
        setup_context=_save,
        lib=route.LIBRARY,
    )


@torch.library.register_fake("rlrr::forward", lib=route.LIBRARY)
def _(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("rlrr::grad_input", lib=route.LIBRARY)
def _(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1]))


@torch.library.register_fake("rlrr::grad_scales", lib=route.LIBRARY)
def _(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    du = x.new_empty(scale_out.shape, dtype=wide)
    dv = x.new_empty(scale_in.shape, dtype=wide)
    return du, dv, x.new_empty((weight.shape[0] if need_shift else 0,), dtype=wide)


@torch.library.register_fake("rlrr::grad_shift", lib=route.LIBRARY)
def _(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1:], dtype=accumulation_dtype(dy.dtype))
