"""Exported programs: what the ops are in plain PyTorch, for runtimes that do not have this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch._ops import OpOverload

from rlrr_kernels import ops
from rlrr_kernels.backends import reference


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
        ops.grad_shift: reference.grad_shift,
        ops.layer_norm: ops.layer_norm_plain,
        ops.layer_norm_backward: ops.layer_norm_backward_plain,
    }


def refuse_script(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` calls first."""
    raise RuntimeError(
        f"{type(module).__name__}: torch.jit.script cannot compile it; use torch.export or torch.jit.trace, "
        "or script what merge_and_unload returns"
    )
