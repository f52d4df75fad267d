"""Exported programs: what the ops are in plain PyTorch, for runtimes that do not have this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload

from rlrr_kernels import ops, reference
from rlrr_kernels.functional import _RescaledLinear


def decomposition_table() -> dict[OpOverload, Callable[..., Any]]:
    """What turns the ops of an exported program into plain ATen, by the formula.

    ``torch.export`` keeps the ops: a program then runs the fused kernels, and needs this package
    where it is loaded. Without them it forms W' at each call and needs PyTorch alone::

        program = torch.export.export(model, (images,))
        plain = program.run_decompositions(rlrr_kernels.decomposition_table())

    Join it with ``torch.export.default_decompositions()`` for core ATen. ``torch.onnx.export`` of a
    model does without; of an exported program it needs this first.

    Returns:
        A new dict: op -> function of its arguments.
    """
    return {
        ops.forward: reference.forward,
        ops.grad_input: reference.grad_input,
        ops.grad_scales: reference.grad_scales,
        ops.layer_norm: ops.layer_norm_plain,
        ops.layer_norm_backward: ops.layer_norm_backward_plain,
    }


def refuse_script(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` calls first."""
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script cannot compile it; use torch.export or torch.jit.trace, "
        "or script what merge_and_unload returns"
    )


def _forward_with_autograd(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """``rlrr::forward`` where a tensor may need a gradient: an exported program that is trained calls the op itself."""
    given = x, weight, scale_out, scale_in, bias, shift
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _RescaledLinear.apply(*given)  # type: ignore[no-any-return]
    if ops.unobserved(*given):  # what the dispatcher would end at, one Python call earlier
        return ops.backend(x, weight).forward(*given)
    with torch._C._AutoDispatchBelowAutograd():
        return ops.forward(*given)


_library: Any = ops._library
_library.impl("forward", _forward_with_autograd, "Autograd")
