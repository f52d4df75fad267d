"""Counts the parameters of a model that train, and groups them for an optimiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm

#: Parameters of each adapter that get weight decay. As in the published code, f and the affines after norms get none.
_DECAYED = {FusedRLRRLinear: ("scale_out", "scale_in"), SSFLayerNorm: (), SSFAffine: ("ssf_scale", "ssf_shift")}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (number of trainable parameters, number of all parameters)."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train and how many there are, as PEFT does."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimiser groups that put weight decay on the same parameters as the published code.

    These are u, v, the affine after the patch embedding and the head's weight, but not f, the affines after norms and
    biases. The published code leaves out each parameter with "bias" or "norm" in its name. A rule by dimension, such
    as timm's, would leave out the affine after the patch embedding.

    Args:
        model: The model. Only parameters that train are grouped.
        weight_decay: The weight decay of the first group.

    Returns:
        Two groups for a ``torch.optim`` optimiser: with weight decay and without.
    """
    undecayed: set[int] = set()
    for module in model.modules():
        decayed = next((names for kind, names in _DECAYED.items() if isinstance(module, kind)), None)
        for name, parameter in module.named_parameters(recurse=False):
            if decayed is not None:
                decays = name in decayed
            else:
                decays = parameter.ndim > 1 and name not in ("bias", "cls_token", "pos_embed")
            if not decays:
                undecayed.add(id(parameter))
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in undecayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in undecayed], "weight_decay": 0.0},
    ]
