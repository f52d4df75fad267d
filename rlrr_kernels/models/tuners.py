"""PEFT's tuners over a :class:`FusedRLRRLinear`, which PEFT takes for a plain ``nn.Linear``.

Such a tuner holds the layer as ``base_layer``. One that adds to what the layer returns, or changes what it is given, is
right while it is not merged. Merged it writes into ``weight``, which the layer would then rescale: so for the time of a
merge the layer's place is taken by its plain twin. A tuner that reads ``weight`` in its own forward pass would leave
the layer out, and is refused.
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
from rlrr_kernels.models import gained
from rlrr_kernels.models.adapt import replace

#: Subpackages of ``peft.tuners`` whose layers call ``base_layer`` and never read its weight before they are merged.
# fmt: off
ADDING = frozenset({
    "adalora", "beft", "c3a", "fourierft", "gralora", "ia3", "ln_tuning", "loha", "lokr", "lora", "pvera", "randlora",
    "road", "unilora", "vblora", "vera", "waveft",
})
# fmt: on

REMEDY = "call rlrr_kernels.merge_and_unload(model) before PEFT wraps it, or leave the layer out of its target_modules"


def _guard(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """For every module that PyTorch puts into another: see to those that PEFT takes as ``base_layer``.

    Raises:
        TypeError: the tuner reads the weight, or stands over another one.
    """
    if name != "base_layer":
        return
    utilities = sys.modules.get("peft.tuners.tuners_utils")  # whoever has a tuner has imported this
    if utilities is None or not isinstance(parent, utilities.BaseTunerLayer):
        return
    inner = module.get_base_layer() if isinstance(module, utilities.BaseTunerLayer) else None
    if isinstance(inner, FusedRLRRLinear):
        raise TypeError(f"FusedRLRRLinear: PEFT cannot merge a second tuner, {_name(parent)}, into it; {REMEDY}")
    if not isinstance(module, FusedRLRRLinear):
        return
    kind = type(parent)
    _, _, subpackage = kind.__module__.partition("peft.tuners.")
    if subpackage.partition(".")[0] not in ADDING:
        raise TypeError(f"FusedRLRRLinear: {_name(parent)} reads the weight of its layer, which is rescaled; {REMEDY}")
    if kind.__name__ == "ParamWrapper" or "ln_tuning" in subpackage:
        return  # the one trains W itself and the other a copy of the layer: nothing is added to W'
    vars(parent)["merge"] = functools.partial(_merge, parent)
    vars(parent)["unmerge"] = functools.partial(_unmerge, parent)
    if hasattr(kind, "update_layer"):
        vars(parent)["update_layer"] = functools.partial(_update_layer, parent)


register_module_module_registration_hook(_guard)


def _merge(tuner: Any, *args: Any, **options: Any) -> None:
    """The tuner's own ``merge``, into the layer's plain twin.

    Raises:
        RuntimeError: as :func:`~rlrr_kernels.models.merge`.
    """
    layer = tuner.base_layer
    if isinstance(layer, FusedRLRRLinear):
        if not layer.enabled:
            raise RuntimeError("FusedRLRRLinear: cannot merge while it is switched off, as inside disable_adapter")
        check_own_parameters(layer, "merge", "weight", "bias")
        check_not_in_fsdp(layer, "merge")
        vars(tuner)["_rescaled"] = layer  # not among the modules: for this time it is none of the model's
        replace(tuner, "base_layer", layer.to_linear())
        if not layer.frozen_bias and gained.matters("bias", layer.shift):
            warnings.warn(
                "merging gives a bias that holds f to layers that had none, which the library that built the model "
                f"does not build: {gained.REMEDY}",
                stacklevel=3,
            )
    try:
        type(tuner).merge(tuner, *args, **options)
    finally:
        if not tuner.merged:
            _put_back(tuner)


def _unmerge(tuner: Any) -> None:
    """The tuner's own ``unmerge``; then the very layer is back, bit for bit."""
    type(tuner).unmerge(tuner)
    _put_back(tuner)


def _put_back(tuner: Any) -> None:
    layer = vars(tuner).pop("_rescaled", None)
    if layer is not None:
        replace(tuner, "base_layer", layer.to(tuner.base_layer.weight.device))


def _update_layer(tuner: Any, adapter_name: str, *args: Any, **options: Any) -> None:
    """The tuner's own ``update_layer``, which makes an adapter.

    Raises:
        TypeError: the adapter reads the weight (DoRA) or starts by moving a part of it away (PiSSA).
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
