"""What of a model trains: how many numbers, and in which groups an optimiser takes them."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many, as PEFT does."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


#: What decays in an adapter; f and the affines after norms do not, as in the published code.
_DECAYED = {FusedRLRRLinear: ("scale_out", "scale_in"), SSFLayerNorm: (), SSFAffine: ("ssf_scale", "ssf_shift")}


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups that decay what the published code decays.

    That is u, v, the affine after the patch embedding and the head's weight; not f, the
    affines after norms and biases. (It leaves out what has "bias" or "norm" in its name.)
    A rule by dimension, as timm's, would leave out the patch affine.

    Returns:
        Two groups for a ``torch.optim`` optimiser, trainable parameters only.
    """
    plain: set[int] = set()
    for module in model.modules():
        decayed = next((names for kind, names in _DECAYED.items() if isinstance(module, kind)), None)
        for name, parameter in module.named_parameters(recurse=False):
            if decayed is not None:
                decays = name in decayed
            else:
                decays = parameter.ndim > 1 and name not in ("bias", "cls_token", "pos_embed")
            if not decays:
                plain.add(id(parameter))
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in plain], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in plain], "weight_decay": 0.0},
    ]
