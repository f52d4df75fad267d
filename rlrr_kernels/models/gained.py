"""Biases that a merge gives to layers that had none: whether the library that builds the model would build them too."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

#: What to do about it, for every library.
REMEDY = "keep the merged model itself (torch.save), or give those layers a bias before such a file is loaded"


def settle(model: nn.Module, gained: Collection[str], needed: Collection[str]) -> None:
    """Let a transformers model's config say that its layers have biases, if it can; else warn.

    Args:
        model: plain again.
        gained: full names of tensors that it has since the merge.
        needed: those of them without which it would compute something else.

    Warns:
        UserWarning: what is saved cannot be loaded by the library that built the model without losing them.
    """
    if not needed or _switched_on(model, set(gained)):
        return
    first, *others = needed
    more = f" and {len(others)} more tensors" if others else ""
    warnings.warn(
        f"merging gave {first}{more} to layers that had none, to hold what was trained. {type(model).__name__}, as its "
        "library builds it, has no such tensor: from_pretrained, or load_state_dict with strict=False, drops it "
        f"without an error; {REMEDY}",
        stacklevel=4,
    )


def matters(name: str, tensor: Tensor) -> bool:
    """Whether a bias is other than 0, or a norm's weight other than 1."""
    if tensor.is_meta:
        return False
    # of a sharded one all of it: processes that came to different answers would wait for each other
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return bool((whole != (1 if name.endswith("weight") else 0)).any())


def _switched_on(model: Any, gained: set[str]) -> bool:
    """Whether a transformers config has switches for biases with which its class builds these tensors.

    They are then set, and what else they govern gets a bias of zero.
    """
    transformers = sys.modules.get("transformers")  # whoever has a model of theirs has imported this
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    off = [name for name, value in vars(model.config).items() if value is False and "bias" in name]
    try:
        plain = _names(model, [])
        fields = [name for name in off if (_names(model, [name]) - plain) & gained]
        built = _names(model, fields)
    except Exception:  # a class that cannot be built from its config alone: nothing is known
        return False
    linears = {f"{name}.bias": m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is None}
    governed = built - plain - gained
    if not (plain | gained <= built and governed <= linears.keys()):
        return False
    for name in fields:
        setattr(model.config, name, True)
    for name in governed:
        weight = linears[name].weight
        linears[name].bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    return True


def _names(model: Any, fields: list[str]) -> set[str]:
    """Of the state dict of a model whose config has these fields set, built without data."""
    config = copy.deepcopy(model.config)
    for name in fields:
        setattr(config, name, True)
    with torch.device("meta"):
        return set(type(model)(config).state_dict())
