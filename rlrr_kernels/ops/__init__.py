"""The ops and their fakes: four for the rescaled linear layer, two for SSF's LayerNorm.

A backend is a module with five functions and no knowledge of modules, autocast
or autograd (shapes as in :mod:`rlrr_kernels.backends.reference`)::

    forward(x, weight, scale_out, scale_in, bias, shift) -> y
    grad_input(dy, weight, scale_out, scale_in) -> dx
    grad_scales(dy, x, weight, scale_out, scale_in, need_shift) -> (du, dv, df)
    grad_shift(dy) -> df, where neither u nor v trains
    unsupported(x, weight) -> why it cannot serve these tensors, or None

To add one, write that module and add its line to the table in
:mod:`rlrr_kernels.backends.choice`. The choice is made when an op runs, behind the
dispatcher, so ``torch.compile`` neither sees nor guards on it.

The two LayerNorm ops have a Triton kernel each, for NVIDIA GPUs; plain PyTorch serves
the rest, under every backend's name but ``triton``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rlrr_kernels.backends import choice
from rlrr_kernels.backends.problem import Pass
from rlrr_kernels.backends.reference import accumulation_dtype


class _Probe(torch.autograd.Function):
    """Refused under any transform of ``torch.func``, for which it lacks a ``setup_context``."""

    @staticmethod
    def forward(ctx: Any) -> None: ...


def _transform() -> bool | None:
    try:
        _Probe.apply()
    except RuntimeError:
        return True
    return None


def _level() -> int:
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:  # no level has been entered
        return -1
    return 0


def _without_memory(t: Tensor) -> bool:
    try:
        t.data_ptr()
    except RuntimeError:
        return True
    return False


def _perhaps(*_: Any) -> bool:
    """Where this torch cannot be asked, the op is called: microseconds slower, and always right."""
    return True


def _part(path: str, instead: Callable[..., Any]) -> Callable[..., Any]:
    """A part of torch that it does not promise to keep; ``instead`` of it, slower, what it promises."""
    try:
        return operator.attrgetter(path)(torch)  # type: ignore[no-any-return]
    except AttributeError:
        return instead


_dispatch_modes = _part("_C._len_torch_dispatch_stack", _perhaps)
_function_modes = _part("_C._len_torch_function_stack", _perhaps)
_pre_dispatch_modes = _part("_ops._len_torch_dispatch_stack_pre_dispatch", _perhaps)
_profiled = _part("_C._autograd._profiler_enabled", _perhaps)
_traced = _part("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
_zero = _part("Tensor._is_zerotensor", _perhaps)
_transforms = _part("_C._functorch.peek_interpreter_stack", _transform)
_mapped = _part("_C._functorch.is_legacy_batchedtensor", _without_memory)
_dual = functools.partial(getattr, forward_ad, "_current_level") if hasattr(forward_ad, "_current_level") else _level


def backend(kernel: Pass, x: Tensor, weight: Tensor, scale_in: Tensor) -> ModuleType:
    """The module whose pass serves x (or dy) ``[..., K]``, W and v, not behind the dispatcher."""
    # a product with an empty side has no work for a kernel, only a shape and zeros
    if x.numel() == 0 or weight.numel() == 0:
        module = choice.load("reference")
        assert not isinstance(module, str)
        return module
    groups = scale_in.shape[0] if scale_in.dim() == 3 else 1
    return choice.module_for(kernel, x, weight, x.numel() // x.shape[-1], groups)


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether it makes no difference that an op is not called: the dispatcher and its Python cost as much as a product.

    It does under a compiler or tracer, a mode, a transform or this thread's profiler, and
    where a tensor is a subclass, has no data, or is only marked as negated or zero, which the dispatcher resolves.
    """
    if (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms() is not None
        or _profiled()
        or _traced()
        or _pre_dispatch_modes()
    ):
        return False
    for t in tensors:  # noqa: SIM110 - a generator costs as much as all else here
        if t is not None and (type(t) not in PLAIN or t.is_meta or t.is_neg() or _zero(t)):
            return False
    return True


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is at work, which only plain PyTorch is right under."""
    return _transforms() is not None or _dual() >= 0


# torch.compiler.assume_constant_result, which would import TorchDynamo and everything under it: traced, the first call
# would seem to give an object always; Dynamo guards on the transforms and on the level itself
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recorded_for_others() -> bool:
    """Whether TorchScript's tracer or an ONNX exporter records, which know neither the ops nor autograd.Functions."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return _traced()  # type: ignore[no-any-return]


def in_plain_torch(grad: Tensor) -> bool:
    """Whether a backward pass must be differentiable, or mapped over, itself: plain PyTorch is, the ops are not."""
    if torch.is_grad_enabled() or transformed():
        return True
    # what is_grads_batched=True maps by is no transform of torch.func's, and shows on the tensor alone
    return not torch.compiler.is_compiling() and _mapped(grad)


def rows(x: Tensor) -> Tensor:
    """``[..., K]`` as the ops take it, ``[M, K]``, without a copy wherever the strides allow."""
    # not flatten, which cannot be mapped over by is_grads_batched=True; not -1, which K = 0 would leave open
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


#: Types that nothing but PyTorch itself computes with.
PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("rlrr", "DEF")
_library.define(
    "forward(Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, Tensor? bias, Tensor? shift) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "grad_input(Tensor dy, Tensor weight, Tensor scale_out, Tensor scale_in) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "grad_scales(Tensor dy, Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, bool need_shift)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


_library.define("grad_shift(Tensor dy) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    return backend("forward", x, weight, scale_in).forward(x, weight, scale_out, scale_in, bias, shift)


def _grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    return backend("grad_input", dy, weight, scale_in).grad_input(dy, weight, scale_out, scale_in)


def _grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return backend("grad_scales", x, weight, scale_in).grad_scales(dy, x, weight, scale_out, scale_in, need_shift)


def _grad_shift(dy: Tensor) -> Tensor:
    return backend("grad_scales", dy, dy, dy).grad_shift(dy)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("grad_input", _grad_input, "CompositeExplicitAutograd")
_library.impl("grad_scales", _grad_scales, "CompositeExplicitAutograd")
_library.impl("grad_shift", _grad_shift, "CompositeExplicitAutograd")


@torch.library.register_fake("rlrr::forward", lib=_library)
def _(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("rlrr::grad_input", lib=_library)
def _(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1]))


@torch.library.register_fake("rlrr::grad_scales", lib=_library)
def _(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    du = x.new_empty(scale_out.shape, dtype=wide)
    dv = x.new_empty(scale_in.shape, dtype=wide)
    return du, dv, x.new_empty((weight.shape[0] if need_shift else 0,), dtype=wide)


@torch.library.register_fake("rlrr::grad_shift", lib=_library)
def _(dy: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[1:], dtype=accumulation_dtype(dy.dtype))


forward = torch.ops.rlrr.forward.default
grad_input = torch.ops.rlrr.grad_input.default
grad_scales = torch.ops.rlrr.grad_scales.default
grad_shift = torch.ops.rlrr.grad_shift.default


def compose_affine(
    weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """LayerNorm's affine and SSF's after it as one, ``[D]`` each: (xhat w + b) s + t = xhat (w s) + (b s + t)."""
    scale, shift = scale.to(dtype), shift.to(dtype)
    return (
        scale if weight is None else weight.to(dtype) * scale,
        shift if bias is None else bias.to(dtype) * scale + shift,
    )


def layer_norm_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx ``[M, D]``, sum of dy xhat ``[D]`` and sum of dy ``[D]``, those ``mask`` asks for; differentiable."""
    wide = mean.dtype
    composed, _ = compose_affine(weight, None, scale, scale, wide)
    # the last argument's values count for nothing, its presence does
    dx, dy_xhat, dy_sum = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), x.to(wide), x.shape[-1:], mean, rstd, composed, composed, mask
    )
    return dx.to(x.dtype) if mask[0] else None, dy_xhat if mask[1] else None, dy_sum if mask[2] else None


def layer_norm_kernels(x: Tensor) -> Any:
    """The module whose kernels are to serve LayerNorm over x ``[..., D]``, or None where plain PyTorch is.

    The latter also where the kernels have failed ``python -m rlrr_kernels check`` on x's device.

    Raises ``RuntimeError`` if ``triton`` is asked for and cannot, saying why.
    """
    name = choice.requested()
    asked = name == "triton"
    if (not asked and (name is not None or x.device.type != "cuda")) or x.numel() == 0:
        return None
    gone = None if asked else choice.failed("triton", x.device, "layer_norm")
    if gone is None:
        module = choice.load("triton")
        gone = module if isinstance(module, str) else None
    refusal = gone
    if gone is None:
        from rlrr_kernels.backends.triton import layer_norm as kernels

        refusal = kernels.unsupported(x)
        if refusal is None:
            return kernels
    if asked:
        raise RuntimeError(
            f"backend 'triton' cannot serve LayerNorm: {refusal}. Leave the choice open "
            "(RLRR_BACKEND=auto, use_backend('auto')) or name another: " + ", ".join(choice.BACKENDS)
        )
    choice.say_once("triton", "reference", gone)
    return None


_library.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor scale,"
    " bool need_x) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = layer_norm_kernels(x)
    if kernels is not None:
        return kernels.forward(x, weight, bias, scale, shift, eps, dtype)
    return layer_norm_plain(x, weight, bias, scale, shift, eps, dtype)


def layer_norm_plain(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rlrr::layer_norm`` in plain PyTorch: y ``[M, D]``, mean and 1 / deviation ``[M, 1]``."""
    wide = accumulation_dtype(x.dtype)
    composed = compose_affine(weight, bias, scale, shift, wide)
    y, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], *composed, eps)
    return y.to(dtype), mean, rstd


def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = layer_norm_kernels(x)
    if kernels is not None:
        return kernels.backward(dy, x, mean, rstd, weight, bias, scale, need_x)
    return layer_norm_backward_plain(dy, x, mean, rstd, weight, bias, scale, need_x)


def layer_norm_backward_plain(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``rlrr::layer_norm_backward`` in plain PyTorch: dx ``[M, D]`` (``[0, D]`` if not asked for), ds, dt ``[D]``."""
    dx, ds, dt = layer_norm_sums(dy, x, mean, rstd, weight, scale, (need_x, True, True))
    assert ds is not None
    assert dt is not None
    if weight is not None:
        ds = ds * weight.to(ds.dtype)
    if bias is not None:
        ds = ds + dt * bias.to(ds.dtype)
    return x.new_empty((0, x.shape[1])) if dx is None else dx, ds, dt


_library.impl("layer_norm", _layer_norm, "CompositeExplicitAutograd")
_library.impl("layer_norm_backward", _layer_norm_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("rlrr::layer_norm", lib=_library)
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


@torch.library.register_fake("rlrr::layer_norm_backward", lib=_library)
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


layer_norm = torch.ops.rlrr.layer_norm.default
layer_norm_backward = torch.ops.rlrr.layer_norm_backward.default
