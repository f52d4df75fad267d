"""Whether rivals agree with the formula on the inputs they are timed with: a fast wrong result is no result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.timing import Rejected

#: Relative error at which a rival's results count as wrong, well above what roundings of its dtype explain.
LIMITS = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}


def relative_error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative Frobenius error of any tensor; NaN or infinity where a result is not finite.

    Raises:
        Rejected: their number or a shape differs.
    """
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (got, want)]
    if shapes[0] != shapes[1]:
        raise Rejected(f"its results have the shapes {shapes[0]}, the formula's {shapes[1]}")
    errors = [0.0]
    for g, w in zip(got, want, strict=True):
        exact = w.detach().to(torch.promote_types(w.dtype, torch.float32))
        off, norm = float((g.detach().to(exact.dtype) - exact).norm()), float(exact.norm())
        errors.append(off / norm if norm else off and float("inf"))
    return float(torch.tensor(errors, dtype=torch.float64).max())


class Formula:
    """The formula's results for one group of rivals.

    Args:
        compute: gives them, and is called once, when first asked for. dtype: of the group, which sets the limit.
    """

    def __init__(self, compute: Callable[[], tuple[Tensor, ...]], dtype: torch.dtype) -> None:
        self._compute, self.limit = compute, LIMITS[dtype]
        self._want: tuple[Tensor, ...] | None = None
        self._fits = True

    def error(self, got: Sequence[Tensor]) -> float | None:
        """A rival's relative error, None where the formula itself has no room.

        Raises:
            Rejected: it is above the limit, or not a number.
        """
        if self._want is None and self._fits:
            try:
                self._want = self._compute()
            except torch.OutOfMemoryError:
                self._fits = False
        if self._want is None:
            return None
        error = relative_error(got, self._want)
        if not error <= self.limit:
            raise Rejected(f"its results are {error:.1%} off the formula's, expected {self.limit:.0%} at most")
        return round(error, 9)
