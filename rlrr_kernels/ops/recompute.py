"""Forms a linear layer's input again in backward, from what the operation before the layer keeps in any case.

GELU keeps its input, and so does LayerNorm. If the linear layer behind one of them kept what it returned, a block of a
transformer would keep each activation twice. ``RLRR_RECOMPUTE=0`` keeps the inputs instead; it is read once.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rlrr_kernels.ops import layer_norm, route

if os.environ.get("RLRR_RECOMPUTE") not in (None, "", "0", "1"):
    raise ValueError(f"RLRR_RECOMPUTE: expected 0 or 1, got {os.environ['RLRR_RECOMPUTE']!r}")
_enabled = os.environ.get("RLRR_RECOMPUTE") != "0"


class Origin(NamedTuple):
    """What an operation was given.

    Attributes:
        operation: The operation. With ``tensors`` it returns the same bits again.
        tensors: Its arguments, which autograd keeps for the operation.
        result: A reference to what it returned, which does not keep that.
    """

    operation: Callable[..., Tensor]
    tensors: tuple[Tensor | None, ...]
    result: weakref.ReferenceType[Tensor]


def origin(x: Tensor) -> Origin | None:
    """Return how to form ``x`` again, or None if it must be kept."""
    if torch.compiler.is_compiling():  # a compiler plans itself what is kept
        return None
    node: Any = x.grad_fn
    # Changed in place, x is no longer what the operation returned. Hooks on saved tensors (checkpointing, offloading)
    # decide themselves what is kept.
    if node is None or not _enabled or x._version or not torch.is_grad_enabled() or route.has_saved_tensor_hooks():
        return None
    try:
        if type(node).__name__ != "GeluBackward0":
            found = layer_norm.arguments_of(node)
        elif route.is_packed(node._raw_saved_self):
            found = None
        else:
            found = functools.partial(F.gelu, approximate=node._saved_approximate), (node._saved_self,)
    except RuntimeError:  # a backward pass has freed what the node kept, or it was changed in place
        return None
    return None if found is None else Origin(*found, weakref.ref(x))


def again(
    operation: Callable[..., Tensor],
    result: weakref.ReferenceType[Tensor],
    dtype: torch.dtype,
    tensors: Iterable[Tensor | None],
) -> Tensor:
    """Return what the operation of an :class:`Origin` returned, in ``dtype``."""
    # second derivatives with respect to the result need that tensor itself, which its owner then holds
    x = result() if torch.is_grad_enabled() else None
    return (operation(*tensors) if x is None or x._version else x).to(dtype)
