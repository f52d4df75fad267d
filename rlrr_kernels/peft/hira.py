"""PEFT's HiRA layers on :func:`~rlrr_kernels.rescaled_linear`: HiRA's W + W * (B A) is W * (1 + u v) of rank r.

Only the class of a layer changes, to a subclass of PEFT's that overrides ``forward``. So parameters, their names, what
PEFT saves, merges and switches stay PEFT's, and a pass that the op does not compute is PEFT's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.hira.layer import HiraLayer, Linear
from torch import Tensor, nn

from rlrr_kernels.backends.problem import MAX_RANK
from rlrr_kernels.ops.linear import rescaled_linear
from rlrr_kernels.peft.base import check_base, has_hooks, is_conv1d, weight_of


@dataclass(frozen=True)
class HiraReport:
    """What :func:`accelerate_hira` did.

    Attributes:
        fused: Names of the layers whose passes run on the op.
        left: Name of a layer whose passes are PEFT's own, always or for now, to the reason.
    """

    fused: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} HiRA layers run on rescaled_linear, {len(self.left)} are left to PEFT"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.left.items()])


class FusedHiraLinear(Linear):
    """PEFT's HiRA layer whose passes run on the op; never constructed, layers become one."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute x (W * (1 + sum of B A))^T + b.

        Args:
            x: ``[..., K]``.

        Returns:
            y ``[..., N]`` in x's dtype, or in autocast's.
        """
        names = _active(self)
        weight = weight_of(self.base_layer)
        if (
            args
            or kwargs
            or self.merged
            or self.disable_adapters
            or not names
            or _refusal(self, names) is not None
            # for PyTorch's own error, if x's dtype is not that of W
            or not (x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type))
        ):
            return super().forward(x, *args, **kwargs)
        if len(names) == 1:
            u, v = self.hira_B[names[0]], self.hira_A[names[0]]
        else:
            # a sum of products of ranks r and s is one product of rank r + s
            u = torch.cat([self.hira_B[name] for name in names], 1)
            v = torch.cat([self.hira_A[name] for name in names])
        return rescaled_linear(x, weight, u, v, self.base_layer.bias)


def accelerate_hira(model: nn.Module) -> HiraReport:
    """Let the HiRA layers of a PEFT model run on :func:`~rlrr_kernels.rescaled_linear`, in place.

    The op computes the same outputs and gradients and neither forms nor keeps W * (B A). Parameters stay the same
    objects under the same names, so PEFT saves, loads, merges, switches and deletes adapters as before, and optimizers
    go on. :func:`restore_hira` undoes it. Layers that PEFT wraps later are accelerated by another call.

    PEFT's own pass runs, without an error, where the op does not fit: in training with ``hira_dropout``, if the active
    adapters have more than 128 ranks together, while adapters are merged or disabled, and where the frozen layer has
    hooks.

    Args:
        model: A model with HiRA layers, as ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` return.

    Returns:
        Which layers run on the op now, and why the others do not.

    Raises:
        ValueError: If the model has no HiRA layer.
    """
    fused, left = [], {}
    for name, layer in model.named_modules():
        if not isinstance(layer, HiraLayer):
            continue
        reason = _misfit(layer)
        if reason is None:
            layer.__class__ = FusedHiraLinear
            reason = _refusal(layer, _active(layer)) or _dropout(layer)
        if reason is None:
            fused.append(name)
        else:
            left[name] = reason
    if not fused and not left:
        raise ValueError(f"model: expected one with HiRA layers of PEFT, got {type(model).__name__} without any")
    return HiraReport(tuple(fused), left)


def restore_hira(model: nn.Module) -> None:
    """Undo :func:`accelerate_hira`: all HiRA layers run on PEFT's own code again, with the same parameters."""
    for layer in model.modules():
        if isinstance(layer, FusedHiraLinear):
            layer.__class__ = Linear


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.hira_A]


def _misfit(layer: Any) -> str | None:
    """Why a layer can never run on the op, or None."""
    if type(layer) not in (Linear, FusedHiraLinear) or "forward" in vars(layer):
        return f"{type(layer).__module__}.{type(layer).__qualname__} is not PEFT's layer over a plain linear"
    try:
        check_base(layer.base_layer, "base_layer")
    except (TypeError, ValueError) as error:
        return str(error)
    if bool(layer.fan_in_fan_out) is not is_conv1d(layer.base_layer):
        return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit {type(layer.base_layer).__name__}"
    return None


def _refusal(layer: Any, names: list[str]) -> str | None:
    """Why PEFT's own code runs a pass with these adapters now, or None; asked in each pass."""
    if has_hooks(layer.base_layer):
        return "its base_layer has hooks, which the op would not call"
    rank = 0
    for name in names:
        dropout = layer.hira_dropout[name]
        if dropout.training and type(dropout) is not nn.Identity:
            return _dropout(layer)
        rank += layer.r[name]
    if rank > MAX_RANK:
        return f"the active adapters have rank {rank} together, the op at most {MAX_RANK}"
    return None


def _dropout(layer: Any) -> str | None:
    """Why a layer runs on the op in evaluation only, or None."""
    if any(type(layer.hira_dropout[name]) is not nn.Identity for name in _active(layer)):
        return "hira_dropout is above 0, so training is PEFT's own; evaluation runs on the op"
    return None
