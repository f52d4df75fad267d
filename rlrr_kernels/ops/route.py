"""Which way a call takes: straight to a backend, through the registered op, or by plain PyTorch.

A backend is called directly where nobody watches, because the dispatcher and a Python kernel behind it
cost as much as a small product. Compilers, tracers, modes, profilers and tensor subclasses must see the
registered op. Transforms of ``torch.func``, forward-mode AD and second derivatives take plain PyTorch,
which can be differentiated and mapped over.

Every question to a private part of torch's dispatcher, autograd and transforms stands here.
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

#: Where the ops ``rlrr::*`` are registered.
LIBRARY = torch.library.Library("rlrr", "DEF")

#: Tensor types that nothing but PyTorch itself computes with.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


class _Probe(torch.autograd.Function):
    """Raises under any transform of ``torch.func``, because it has no ``setup_context``."""

    @staticmethod
    def forward(ctx: Any) -> None: ...


def _probe_transform() -> bool | None:
    try:
        _Probe.apply()
    except RuntimeError:
        return True
    return None


def _probe_dual_level() -> int:
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:  # no level has been entered
        return -1
    return 0


def _has_no_memory(t: Tensor) -> bool:
    try:
        t.data_ptr()
    except RuntimeError:
        return True
    return False


def _assume_yes(*_: Any) -> bool:
    """Stands for a question that this torch cannot answer: the op is then called, which is slower and always right."""
    return True


def _private(path: str, fallback: Callable[..., Any]) -> Callable[..., Any]:
    """The function at ``torch.<path>``, or ``fallback`` in a version of torch that lacks it."""
    try:
        return operator.attrgetter(path)(torch)  # type: ignore[no-any-return]
    except AttributeError:
        return fallback


_dispatch_modes = _private("_C._len_torch_dispatch_stack", _assume_yes)
_function_modes = _private("_C._len_torch_function_stack", _assume_yes)
_pre_dispatch_modes = _private("_ops._len_torch_dispatch_stack_pre_dispatch", _assume_yes)
_is_profiling = _private("_C._autograd._profiler_enabled", _assume_yes)
_is_tracing = _private("_C._is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]
_is_zero_tensor = _private("Tensor._is_zerotensor", _assume_yes)
_transform = _private("_C._functorch.peek_interpreter_stack", _probe_transform)
_saved_tensor_hooks = _private("_C._autograd._top_saved_tensors_default_hooks", _assume_yes)
_is_batched = _private("_C._functorch.is_legacy_batchedtensor", _has_no_memory)
_dual_level = (
    functools.partial(getattr, forward_ad, "_current_level")
    if hasattr(forward_ad, "_current_level")
    else _probe_dual_level
)

#: A context in which an op skips its own autograd kernel, or None in a version of torch that lacks it.
BelowAutograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)


def can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether calling a backend directly gives what calling the registered op would.

    Returns:
        False under a compiler, tracer, mode, transform or this thread's profiler, and for a tensor that is a
        subclass, has no data, or is only marked as negated or zero, which the dispatcher resolves.
    """
    if (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transform() is not None
        or _is_profiling()
        or _is_tracing()
        or _pre_dispatch_modes()
    ):
        return False
    for t in tensors:
        if t is not None and (type(t) not in PLAIN_TYPES or t.is_meta or t.is_neg() or _is_zero_tensor(t)):
            return False
    return True


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active."""
    # isinstance, not `is not None`: TorchDynamo, which traces this, wraps None in an object that it knows the type of
    return not isinstance(_transform(), type(None)) or _dual_level() >= 0


def is_exported_without_ops() -> bool:
    """Whether TorchScript's tracer or an ONNX exporter records, which know neither the ops nor autograd.Functions."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return _is_tracing()  # type: ignore[no-any-return]


def needs_plain_forward() -> bool:
    """Whether a forward pass must be plain PyTorch, which can be transformed and exported."""
    return is_transformed() or is_exported_without_ops()


def needs_plain_backward(grad: Tensor) -> bool:
    """Whether a backward pass must be plain PyTorch, because it is itself differentiated or mapped over."""
    if torch.is_grad_enabled() or is_transformed():
        return True
    # is_grads_batched=True maps by a transform that is not one of torch.func's and shows on the tensor alone
    return not torch.compiler.is_compiling() and _is_batched(grad)


def has_saved_tensor_hooks() -> bool:
    """Whether hooks of ``torch.autograd.graph.saved_tensors_hooks`` are active, as under checkpointing."""
    return _saved_tensor_hooks(False) is not None


def is_packed(saved: Any) -> bool:
    """Whether such hooks packed what a node of autograd's graph keeps; asking the node for it would run them."""
    return getattr(saved, "unpack_hook", saved) is not None


def sharding_of(t: Tensor) -> ModuleType | None:
    """:mod:`rlrr_kernels.ops.sharding` if ``t`` is a DTensor, else None.

    The module is imported here because it needs ``torch.distributed.tensor``, which takes half a second to
    import and which whoever has a DTensor has imported already.
    """
    # a sharded parameter is an nn.Parameter by type, too
    if type(t) is Tensor or not hasattr(t, "device_mesh"):
        return None
    from rlrr_kernels.ops import sharding

    return sharding


def laid_out_as(values: Tensor, like: Tensor) -> Tensor:
    """``values``, distributed over the processes as ``like`` is, if it is; every process must have all of them."""
    sharding = sharding_of(like)
    return values if sharding is None else sharding.laid_out_as(values, like)  # type: ignore[no-any-return]


def whole(t: Tensor) -> Tensor:
    """All of a DTensor, gathered in every process (all of them must call this); any other tensor as it is."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t  # type: ignore[no-any-return]


def flatten_tokens(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``, without a copy wherever the strides allow."""
    # not flatten, which is_grads_batched=True cannot map over; not -1, which K = 0 would leave open
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
