"""Checks that a layer's tensors are its own, so that they can be taken over, replaced or drawn anew.

They are not if another module computes them (``torch.nn.utils.parametrize``, prune, weight_norm) or if FSDP holds them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlrr_kernels.ops.linear import FLOATS


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Check the dtype of a layer's weight.

    Raises:
        TypeError: If the kernels do not support it.
    """
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {dtype}")


def check_linear(linear: object, name: str = "linear") -> None:
    """Check that :meth:`~rlrr_kernels.FusedRLRRLinear.from_linear` can replace this layer.

    Args:
        linear: the layer.
        name: what errors call it.

    Raises:
        TypeError, ValueError: As from_linear.
    """
    kind: Any = type(linear)
    if not isinstance(linear, nn.Linear) or kind.forward is not nn.Linear.forward or "forward" in vars(linear):
        own = "" if not isinstance(linear, nn.Linear) else ", whose forward is its own"
        raise TypeError(f"{name}: expected a plain nn.Linear, got {kind.__module__}.{kind.__qualname__}{own}")
    if under_fsdp(linear):
        raise TypeError(f"{name}: FSDP has taken over its parameters; adapt the model before it is sharded")
    for part in ("weight", "bias"):
        if part not in linear._parameters:
            raise TypeError(
                f"{name}: its {part} is no parameter but computed from others (parametrize, prune, weight_norm); "
                "remove that first"
            )
    weight = linear.weight
    if is_lazy(weight):
        raise TypeError(f"{name}: {kind.__name__} has no weight yet; call it once before")
    wrapped = is_traceable_wrapper_subclass(weight) and not hasattr(weight, "device_mesh")  # but for a DTensor
    if wrapped or weight.layout is not torch.strided:
        raise TypeError(
            f"{name}.weight: expected a plain tensor, got {type(weight).__name__} of layout {weight.layout}; "
            "adapt a layer before it is quantised or made sparse"
        )
    check_dtype(f"{name}.weight", weight.dtype)
    if weight.shape != (linear.out_features, linear.in_features):
        raise ValueError(
            f"{name}.weight: expected shape {[linear.out_features, linear.in_features]} as its features say, "
            f"got {list(weight.shape)}"
        )


def check_own_parameters(layer: nn.Module, verb: str, *names: str) -> None:
    """Check that the named tensors are parameters of the layer.

    Args:
        layer: the layer.
        verb: what is about to be done with them, for the error.
        names: attributes of the layer.

    Raises:
        RuntimeError: If one of them is computed from other tensors.
    """
    for name in names:
        if name not in layer._parameters:
            raise RuntimeError(
                f"{type(layer).__name__}: cannot {verb} while {name} is computed from other tensors "
                "(parametrize, prune, weight_norm); remove that first"
            )


def check_not_in_fsdp(layer: nn.Module, verb: str) -> None:
    """Check that FSDP does not hold the layer: its next pass would silently put its own parameters back.

    Args:
        layer: the layer.
        verb: what is about to be done, for the error.

    Raises:
        RuntimeError: If FSDP holds it.
    """
    if under_fsdp(layer):
        raise RuntimeError(
            f"FusedRLRRLinear: cannot {verb} under FSDP, which would put its own parameters back; "
            f"{verb} a plain model that has loaded the full state dict"
        )


def under_fsdp(module: nn.Module) -> bool:
    """Whether FSDP1 or FSDP2 has taken over the parameters of this module itself."""
    return getattr(module, "_is_fsdp_managed_module", False)


def holds_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 has wrapped the model or a part of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a wrapped model has imported it
    return fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())


def reshard(model: nn.Module) -> None:
    """Put the shards back where FSDP2 has left whole parameters in their place after a forward pass."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # a sharded model has imported it
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()
