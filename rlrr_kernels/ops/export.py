"""Exported programs: what the ops are in plain PyTorch, for runtimes that do not have this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

from rlrr_kernels.backends import reference
from rlrr_kernels.ops import layer_norm, linear


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
        linear.forward: reference.forward,
        linear.grad_input: reference.grad_input,
        linear.grad_scales: reference.grad_scales,
        linear.grad_shift: reference.grad_shift,
        layer_norm.layer_norm: reference.layer_norm,
        layer_norm.layer_norm_backward: reference.layer_norm_backward,
    }
