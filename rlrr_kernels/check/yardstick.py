"""Whether results are right: the contract of the package's tests, ``check`` and ``rlrr-tune``.

The relative error against float64 may be at most twice that of the plain PyTorch formula in the same dtype, plus one
rounding of that dtype: eps, or eps / sqrt(count) for 16-bit values, over which independent roundings average. Scale
gradients are float32 by contract whatever x is, and they are compared with a float32 formula; on a GPU the error of the
tensor cores' own additions is allowed too. :func:`judge` also bounds single elements, so that a few wrong ones among
many are seen: none may be more than four times as wrong as the formula's worst, plus one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.backends import reference

#: Tokens of one float64 product; this bounds its memory.
_CHUNK = 8192

#: Bytes of an element -> allowed roundings of the largest element, in eps: one rounding to nearest for 2; another order
#: of the sum for 4; an exact result that is itself a float64 sum for 8.
_ELEMENT_ROUNDINGS = {2: 0.5, 4: 16, 8: 256}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Return ||got - exact|| / ||exact|| in float64; infinity if a value is not finite."""
    got, exact = got.double(), exact.double()
    if not torch.isfinite(got).all():
        return math.inf
    return float((got - exact).norm() / exact.norm().clamp_min(1e-300))


def allowed(plain: Tensor, exact: Tensor, more: float = 0.0) -> float:
    """Return the relative error allowed for results of ``plain``'s shape and dtype; ``more`` is added to it."""
    # roundings of many 16-bit values average out; float32 results also differ in the order of sums, which does not
    rounding = torch.finfo(plain.dtype).eps
    if plain.dtype.itemsize == 2:
        rounding /= max(plain.numel(), 1) ** 0.5
    if plain.dtype is torch.float64:
        rounding *= 16  # the exact answer is no better than a float64 sum itself
    return 2 * relative_error(plain, exact) + rounding + more


def cut(x: Tensor) -> float:
    """Return the relative error of float32 sums over the rows of x ``[M, ...]`` on tensor cores.

    They truncate when they add to a sum, once every 16 products: half a unit in the last place each time on average,
    always towards zero.
    """
    return x.shape[0] / 16 * torch.finfo(torch.float32).eps / 2 if x.is_cuda and x.dtype.itemsize == 2 else 0.0


class Expected(NamedTuple):
    """One expected result.

    Attributes:
        name: As "dx".
        exact: In float64.
        plain: By the plain formula, in the dtype that the pass returns.
        more: Relative error allowed beyond the formula's.
    """

    name: str
    exact: Tensor
    plain: Tensor
    more: float = 0.0


@torch.no_grad()
def expected(
    which: str,
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor,
    shift: Tensor,
    dy: Tensor,
) -> list[Expected]:
    """Return the expected results of a pass, in its order.

    The shapes are those of :mod:`rlrr_kernels.backends.reference`. A tensor that the pass does not read may be empty.

    Args:
        which: ``"forward"``, ``"grad_input"`` or ``"grad_scales"`` (du, dv, df).
    """
    wide, u, v = weight.double(), scale_out.double(), scale_in.double()
    if which == "forward":
        y = torch.cat([reference.forward(x.double(), wide, u, v, bias.double(), shift.double()) for x in _chunks(x)])
        return [Expected("y", y, reference.formula(x, weight, scale_out, scale_in, bias, shift))]
    if which == "grad_input":
        dx = torch.cat([reference.grad_input(dy.double(), wide, u, v) for dy in _chunks(dy)])
        return [Expected("dx", dx, reference.grad_input(dy, weight, scale_out, scale_in))]
    parts = [
        reference.grad_scales(dy.double(), x.double(), wide, u, v, True)
        for dy, x in zip(_chunks(dy), _chunks(x), strict=True)
    ]
    plains = reference.grad_scales(dy, x, weight, scale_out, scale_in, True)
    return [
        Expected(name, torch.stack([part[i] for part in parts]).sum(0), plains[i], cut(x))
        for i, name in enumerate(("du", "dv", "df"))
    ]


def _chunks(t: Tensor) -> Sequence[Tensor]:
    return t.split(_CHUNK)


class Judgement(NamedTuple):
    """The largest ratio of error to allowed error, up to 1 if all is right, and what is wrong, or None."""

    ratio: float
    reason: str | None


def judge(got: Sequence[Tensor], wanted: Sequence[Expected]) -> Judgement:
    """Compare the results of a pass with what is expected; the reason names the first that is wrong."""
    worst, reason = 0.0, None
    for value, want in zip(got, wanted, strict=True):
        ratio, why = _judge(value, *want)
        worst, reason = max(worst, ratio), reason or why
    return Judgement(worst, reason)


def _judge(got: Tensor, name: str, exact: Tensor, plain: Tensor, more: float) -> Judgement:
    if got.shape != plain.shape or got.dtype != plain.dtype:
        due = f"expected {plain.dtype} {list(plain.shape)}"
        return Judgement(math.inf, f"{name}: {got.dtype} {list(got.shape)}, {due}")
    if not bool(torch.isfinite(got).all()):
        return Judgement(math.inf, f"{name}: not finite")
    error, bound = relative_error(got, exact), allowed(plain, exact, more)
    largest = exact.abs().max().clamp_min(1e-300)
    element, theirs = (float((t.double() - exact).abs().max() / largest) for t in (got, plain))
    element_bound = 4 * theirs + _ELEMENT_ROUNDINGS[plain.dtype.itemsize] * torch.finfo(plain.dtype).eps + more
    ratio = max(error / bound, element / element_bound)
    if error > bound:
        return Judgement(ratio, f"{name}: error {error:.1e}, allowed {bound:.1e}")
    if element > element_bound:
        why = f"{name}: an element is off by {element:.1e} of the largest, allowed {element_bound:.1e}"
        return Judgement(ratio, why)
    return Judgement(ratio, None)
