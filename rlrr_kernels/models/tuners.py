"""PEFT's tuners over a :class:`FusedRLRRLinear`, which PEFT takes for a plain ``nn.Linear``.

Such a tuner holds the layer as ``base_layer``. A tuner that adds to what the layer returns, or changes its input, is
right as long as it is not merged. To merge, it writes into ``weight``, which the layer would then rescale; so during a
merge a plain ``nn.Linear`` that computes the same takes the layer's place. A tuner that reads ``weight`` in its own
forward pass would leave the layer out, and is refused.
"""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.ownership import check_not_in_fsdp, check_own_parameters
from rlrr_kernels.models.merge import ADDED_BIAS_REMEDY, has_effect
from rlrr_kernels.models.modules import replace

#: Subpackages of ``peft.tuners`` whose layers call ``base_layer``, and read its weight only to merge.
# fmt: off
SUPPORTED = frozenset({
    "adalora", "beft", "c3a", "fourierft", "gralora", "ia3", "ln_tuning", "loha", "lokr", "lora", "pvera", "randlora",
    "road", "unilora", "vblora", "vera", "waveft",
})
# fmt: on

REMEDY = "call rlrr_kernels.merge_and_unload(model) before PEFT wraps it, or leave the layer out of its target_modules"


def _check_base_layer(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Prepare a tuner for a :class:`FusedRLRRLinear` as its ``base_layer``, or refuse it.

    PyTorch calls this for every module that is registered in another.

    Raises:
        TypeError: If the tuner reads the layer's weight, or wraps another tuner.
    """
    if name != "base_layer":
        return
    utilities = sys.modules.get("peft.tuners.tuners_utils")  # every tuner imports this module
    if utilities is None or not isinstance(parent, utilities.BaseTunerLayer):
        return
    inner = module.get_base_layer() if isinstance(module, utilities.BaseTunerLayer) else None
    if isinstance(inner, FusedRLRRLinear):
        raise TypeError(f"FusedRLRRLinear: PEFT cannot merge a second tuner, {_name(parent)}, into it; {REMEDY}")
    if not isinstance(module, FusedRLRRLinear):
        return
    kind = type(parent)
    _, _, subpackage = kind.__module__.partition("peft.tuners.")
    if subpackage.partition(".")[0] not in SUPPORTED:
        raise TypeError(f"FusedRLRRLinear: {_name(parent)} reads the weight of its layer, which is rescaled; {REMEDY}")
    if kind.__name__ == "ParamWrapper" or "ln_tuning" in subpackage:
        return  # these train W itself or a copy of the layer, and add nothing to W'
    vars(parent)["merge"] = functools.partial(_merge, parent)
    vars(parent)["unmerge"] = functools.partial(_unmerge, parent)
    if hasattr(kind, "update_layer"):
        vars(parent)["update_layer"] = functools.partial(_update_layer, parent)


register_module_module_registration_hook(_check_base_layer)


def _merge(tuner: Any, *args: Any, **options: Any) -> None:
    """Stand in for the tuner's ``merge``: merge into a plain layer that computes the same.

    Raises:
        RuntimeError: As :func:`~rlrr_kernels.merge`.
    """
    layer = tuner.base_layer
    if isinstance(layer, FusedRLRRLinear):
        if not layer.enabled:
            raise RuntimeError("FusedRLRRLinear: cannot merge while it is switched off, as inside disable_adapter")
        check_own_parameters(layer, "merge", "weight", "bias")
        check_not_in_fsdp(layer, "merge")
        vars(tuner)["_rescaled"] = layer  # not in _modules: the model must not hold it twice
        replace(tuner, "base_layer", layer.to_linear())
        if not layer.frozen_bias and has_effect("bias", layer.shift):
            warnings.warn(
                "merging gives a bias that holds f to layers that had none, which the library that built the model "
                f"does not build: {ADDED_BIAS_REMEDY}",
                stacklevel=3,
            )
    try:
        type(tuner).merge(tuner, *args, **options)
    finally:
        if not tuner.merged:
            _put_back(tuner)


def _unmerge(tuner: Any) -> None:
    """Stand in for the tuner's ``unmerge``: afterwards the same layer is back, bit for bit."""
    type(tuner).unmerge(tuner)
    _put_back(tuner)


def _put_back(tuner: Any) -> None:
    layer = vars(tuner).pop("_rescaled", None)
    if layer is not None:
        replace(tuner, "base_layer", layer.to(tuner.base_layer.weight.device))


def _update_layer(tuner: Any, adapter_name: str, *args: Any, **options: Any) -> None:
    """Stand in for the tuner's ``update_layer``, which creates an adapter.

    Raises:
        TypeError: If the adapter reads the weight (DoRA), or moves a part of it into the adapter (PiSSA).
    """
    weight = tuner.get_base_layer().weight
    values = weight.data.clone()
    type(tuner).update_layer(tuner, adapter_name, *args, **options)
    moved = not weight.is_meta and not torch.equal(tuner.get_base_layer().weight.data, values)
    if moved or adapter_name in getattr(tuner, "lora_variant", ()):
        weight.data = values
        raise TypeError(
            f"FusedRLRRLinear: this kind of {_name(tuner)} reads or moves the weight of its layer, which is rescaled; "
            f"{REMEDY}"
        )


def _name(tuner: nn.Module) -> str:
    return f"{type(tuner).__module__}.{type(tuner).__qualname__}"
