"""Forms of updates of a linear's weight, from W to W', with one class for each form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Update(Protocol):
    """The update of one weight."""

    def __call__(self, weight: Tensor) -> Tensor:
        """W' ``[N, K]`` of W ``[N, K]``, in float64 on a CPU and in W's dtype elsewhere.

        Raises:
            ValueError: If the update is for a weight of another shape.
        """
        ...

    def scales(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        """u ``[n, r]`` and v ``[r, K]`` of these rows if W' = W * (1 + u v), else None."""
        ...


@dataclass(frozen=True)
class Rescaled:
    """RLRR: W * (1 + u v) with u ``[N, r]`` and v ``[r, K]``, or ``[groups, r, K]`` for equal blocks of rows.

    A constant factor of u v is part of u.
    """

    scale_out: Tensor
    scale_in: Tensor

    def __post_init__(self) -> None:
        u, v = self.scale_out, self.scale_in
        if u.ndim != 2 or v.ndim not in (2, 3) or u.shape[1] != v.shape[-2]:
            raise ValueError(
                "expected scale_out [N, r] and scale_in [r, K] or [groups, r, K], "
                f"got {list(u.shape)} and {list(v.shape)}"
            )
        if not self._v().shape[0]:
            raise ValueError(f"scale_in: expected one group or more, got {list(v.shape)}")
        if u.shape[0] % self._v().shape[0]:
            raise ValueError(f"scale_in: {v.shape[0]} groups do not divide {u.shape[0]} rows")

    def _v(self) -> Tensor:
        return self.scale_in if self.scale_in.ndim == 3 else self.scale_in[None]

    def __call__(self, weight: Tensor) -> Tensor:
        u, v = self.scale_out, self._v()
        _check(weight, (u.shape[0], v.shape[2]))
        wide = _wide(weight)
        u, v = u.to(wide), v.to(wide)
        groups, rank, _ = v.shape
        return wide * (1 + (u.view(groups, -1, rank) @ v).flatten(0, 1))

    def scales(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        v = self._v()
        first, last, block = rows.start, rows.stop - 1, self.scale_out.shape[0] // v.shape[0]
        if first // block != last // block:
            return None  # the rows are of several groups
        return self.scale_out[rows], v[first // block]


@dataclass(frozen=True)
class OutputScaled:
    """SSF: diag(a) W, a scale a ``[N]`` after the layer."""

    scale: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        _check(weight, (self.scale.numel(), weight.shape[1]))
        wide = _wide(weight)
        return wide * self.scale.to(wide).flatten()[:, None]

    def scales(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        return self.scale.flatten()[rows, None].double() - 1, torch.ones(1, 1, dtype=torch.float64)


@dataclass(frozen=True)
class LowRank:
    """LoRA: W + scaling * B A with A ``[r, K]`` and B ``[N, r]``."""

    a: Tensor
    b: Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"expected lora_A [r, K] and lora_B [N, r], got {list(self.a.shape)}, {list(self.b.shape)}"
            )

    def __call__(self, weight: Tensor) -> Tensor:
        _check(weight, (self.b.shape[0], self.a.shape[1]))
        wide = _wide(weight)
        return wide + self.scaling * (self.b.to(wide) @ self.a.to(wide))

    def scales(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        return None


@dataclass(frozen=True)
class Replaced:
    """Full fine-tuning: another weight ``[N, K]``."""

    weight: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        _check(weight, tuple(self.weight.shape))
        return self.weight.to(_wide(weight))

    def scales(self, rows: slice) -> tuple[Tensor, Tensor] | None:
        return None


def _wide(weight: Tensor) -> Tensor:
    return weight.double() if weight.device.type == "cpu" else weight


def _check(weight: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(weight.shape) != expected:
        raise ValueError(f"the update is for a weight of shape {list(expected)}, and this one is {list(weight.shape)}")
