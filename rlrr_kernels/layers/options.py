"""The options of the layers: how u, v and affines start, and the rank, the groups and the scaling of u v."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor

from rlrr_kernels.backends.problem import MAX_RANK

#: The named ways to initialise u and v, see :class:`~rlrr_kernels.FusedRLRRLinear`.
INITS = ("paper", "identity")

#: One of :data:`INITS`, or a function that fills (scale_out, scale_in) in place.
Init = str | Callable[[Tensor, Tensor], None]


def check_init(init: object) -> None:
    """Check an ``init`` argument.

    Raises:
        ValueError: If it is neither one of :data:`INITS` nor callable.
    """
    if not callable(init) and init not in INITS:
        raise ValueError(f"init: expected 'paper', 'identity' or a callable, got {init!r}")


def check_int(value: object, name: str) -> int:
    """Return an integer of any type, as NumPy's, as Python's.

    Raises:
        TypeError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    return int(value)


def check_rank(rank: object, name: str = "rank") -> int:
    """Return a ``rank`` argument as Python's int.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is not from 1 to 128.
    """
    rank = check_int(rank, name)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{name}: expected 1 to {MAX_RANK}, got {rank}")
    return rank


def check_groups(groups: object, name: str = "groups") -> int:
    """Return a number of groups as Python's int.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is below 1.
    """
    groups = check_int(groups, name)
    if groups < 1:
        raise ValueError(f"{name}: expected 1 or more, got {groups}")
    return groups


def check_scaling(scaling: object) -> float:
    """Return a ``scaling`` argument as Python's float.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite and above 0.
    """
    if isinstance(scaling, bool) or not isinstance(scaling, Real):
        raise TypeError(f"scaling: expected a float, got {type(scaling).__name__}")
    try:
        value = float(scaling)
    except OverflowError:  # of an int or a fraction
        value = math.inf
    if not 0 < value < math.inf:
        raise ValueError(f"scaling: expected a finite number above 0, got {scaling!s:.80}")
    return value


def init_name(init: Init) -> str:
    """The name of an ``init`` in a layer's ``repr``."""
    return init if isinstance(init, str) else getattr(init, "__name__", repr(init))


@torch.no_grad()
def draw_scales(init: Init, scale_out: Tensor, scale_in: Tensor) -> None:
    """Fill u ``[N, r]`` and v ``[groups, r, K]`` or ``[r, K]`` in place, as ``init`` says."""
    if callable(init):
        init(scale_out, scale_in)
        return
    rank, k = scale_in.shape[-2:]
    bound = math.sqrt(6 / (k * rank)) if k else 0.0
    scale_in.uniform_(-bound, bound)
    if init == "identity":
        scale_out.zero_()
    else:
        scale_out.uniform_(-math.sqrt(6), math.sqrt(6))
