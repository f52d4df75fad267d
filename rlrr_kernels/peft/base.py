"""The frozen layers under a tuner: ``nn.Linear``, and the ``Conv1D`` of transformers, which stores W as ``[K, N]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from rlrr_kernels.layers.ownership import check_dtype, check_linear


def is_conv1d(layer: Any) -> bool:
    """Whether it stores W transposed."""
    return isinstance(layer, Conv1D)


def check_base(layer: Any, name: str) -> None:
    """Check that the op can compute a frozen layer.

    Args:
        layer: The layer.
        name: What errors call it.

    Raises:
        TypeError, ValueError: As :meth:`~rlrr_kernels.FusedRLRRLinear.from_linear`, but for ``Conv1D``.
    """
    if not is_conv1d(layer):
        check_linear(layer, name)
        return
    own = type(layer).forward is not Conv1D.forward or "forward" in vars(layer)
    if own or "weight" not in layer._parameters or is_traceable_wrapper_subclass(layer.weight):
        raise TypeError(f"{name}: expected a plain Conv1D with a weight of its own, got {type(layer).__qualname__}")
    check_dtype(f"{name}.weight", layer.weight.dtype)


def weight_of(layer: Any) -> Tensor:
    """W ``[N, K]`` of a frozen layer, for a ``Conv1D`` a transposed view."""
    return layer.weight.mT if is_conv1d(layer) else layer.weight


def has_hooks(layer: Any) -> bool:
    """Whether a call of the frozen layer runs more than its own forward, which the op would not."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in vars(layer)


def call(layer: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a frozen layer with ``forward`` in the place of its own, between its hooks.

    Raises:
        RuntimeError: If the layer has another forward than its class, and not by a hook of accelerate.
    """
    return _call_between_hooks(layer, forward, x) if has_hooks(layer) else forward(x)


@torch.compiler.disable  # TorchDynamo does not see that an attribute hides a method
def _call_between_hooks(layer: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # accelerate's forward calls this one, between moving tensors to a device and back
    name = "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
    if name == "forward" and getattr(layer.forward, "__func__", None) is not type(layer).forward:
        raise RuntimeError(
            f"base_layer: expected the forward of {type(layer).__name__}, got one of its own, {layer.forward!r}, which "
            "would not use the adapter; set it on the adapted layer instead"
        )
    before = vars(layer).get(name)
    setattr(layer, name, forward)
    try:
        return layer(x)  # type: ignore[no-any-return]
    finally:
        delattr(layer, name)
        if before is not None:
            setattr(layer, name, before)
