"""A drawn problem as a few small literals, so that it prints, shrinks and comes back; and its tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from rlrr_kernels.backends.reference import accumulation_dtype
from tests.oracle import Problem, strided

NAMES = ("x", "weight", "scale_out", "scale_in", "bias", "shift")

#: How a matrix may lie in memory, besides row by row.
LAYOUTS_2D = (
    "transposed",
    "sliced",
    "rows apart",
    "columns of a wider matrix",
    "off by one element",
    "overlapping rows",
    "one column",
    "one row",
    "expanded",
)
#: How a vector, and how x or dy of three dimensions and more may.
LAYOUTS_1D = ("every third", "off by one element", "one value")
LAYOUTS_ND = ("channels first", "without the first token", "every other token", "one image")

#: Layouts of few values, each many times.
REPEATING = {"one column", "one row", "expanded", "one value", "one image"}


def layouts(dims: int) -> tuple[str, ...]:
    """Those that a tensor of so many dimensions may have, the plain one first."""
    return ("contiguous", *(LAYOUTS_1D if dims == 1 else LAYOUTS_2D if dims == 2 else LAYOUTS_ND))


@dataclass(frozen=True)
class Case:
    """One problem. dtypes by name; tuples in the order of ``NAMES``, ``sizes`` with dy's at the end."""

    lead: tuple[int, ...] = (3,)  # x is [*lead, K]
    n: int = 2
    k: int = 2
    groups: int = 1
    dtypes: tuple[str, ...] = ("float32",) * 6
    sizes: tuple[float, ...] = (1.0,) * 7  # standard deviations, 0 for a tensor of zeros
    needs: tuple[bool, ...] = (True, False, True, True, True, True)
    bias: bool = True
    shift: bool = True
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    vector_layout: str = "contiguous"
    v_layout: str = "contiguous"
    u_dims: int = 2
    v_dims: int = 3
    fence: int = 64  # elements of NaN on either side of each tensor
    also: str = ""  # the property that is looked at besides those that always are
    seed: int = 0

    @property
    def m(self) -> int:
        return math.prod(self.lead)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.dtypes[0])

    @property
    def wide(self) -> torch.dtype:
        return accumulation_dtype(self.dtype)

    def text(self) -> str:
        """What ``python -m tests.reliability.soak --case`` takes; only what differs from the defaults."""
        return repr({name: value for name, value in asdict(self).items() if value != getattr(Case, name)})


@dataclass
class Inputs:
    """The tensors of a case as a user would pass them, and dy in the shape of y."""

    x: Tensor
    weight: Tensor
    scale_out: Tensor
    scale_in: Tensor
    bias: Tensor | None
    shift: Tensor | None
    dy: Tensor

    def args(self) -> tuple[Tensor | None, ...]:
        return tuple(getattr(self, name) for name in NAMES)

    def given(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if t is not None}

    def problem(self) -> Problem:
        """In canonical shapes, without a copy where strides allow."""
        n, k = self.weight.shape
        v = self.scale_in if self.scale_in.dim() == 3 else self.scale_in.view(1, 1, k)
        return Problem(
            self.x.reshape(-1, k) if k else self.x.new_empty(math.prod(self.x.shape[:-1]), 0),
            self.weight,
            self.scale_out.view(n, 1),
            v,
            self.bias,
            self.shift,
            self.dy.reshape(-1, n) if n else self.dy.new_empty(math.prod(self.dy.shape[:-1]), 0),
        )

    def map(self, change: Any) -> Inputs:
        return Inputs(**{name: None if t is None else change(name, t) for name, t in vars(self).items()})


def lay_out(t: Tensor, how: str) -> Tensor:
    """A tensor laid out otherwise; the same values, but for layouts that repeat some."""
    if how == "contiguous" or t.numel() == 0:
        return t
    if how == "channels first":
        return t.movedim(-1, 1).contiguous().movedim(1, -1)
    if how in ("without the first token", "every other token"):
        step, first = (1, 1) if how == "without the first token" else (2, 0)
        wide = t.new_full((*t.shape[:-2], step * t.shape[-2] + first, t.shape[-1]), float("nan"))
        wide[..., first::step, :] = t
        return wide[..., first::step, :]
    if how == "one image":
        return t[:1].expand(t.shape)
    if t.dim() == 1:
        names = {"every third": "sliced", "off by one element": "off by one element", "one value": "expanded"}
        return strided(t[None], names[how])[0]
    rows, cols = t.shape
    if how == "overlapping rows":  # a sliding window
        return t.contiguous().as_strided((rows, cols), (1, 1))
    if how == "one column":
        return t[:, :1].expand(rows, cols)
    return strided(t, how)


def fenced(t: Tensor, count: int) -> Tensor:
    """The same values and strides, in a storage of its own, with ``count`` NaN before and after."""
    if count == 0 or t.numel() == 0:
        return t
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    storage = t.new_full((span + 2 * count,), float("nan"))
    # the gaps between elements too, which may hold anything
    storage[count : count + span] = t.as_strided((span,), (1,))
    return storage.as_strided(t.shape, t.stride(), count)


def build(case: Case, device: str) -> Inputs:
    """The tensors, the same each time."""
    g = torch.Generator().manual_seed(case.seed)
    kinds = dict(zip(NAMES, case.dtypes, strict=True)) | {"dy": case.dtypes[0]}
    sizes = dict(zip((*NAMES, "dy"), case.sizes, strict=True))
    n, k = case.n, case.k
    shapes = {
        "x": (*case.lead, k),
        "weight": (n, k),
        "scale_out": (n, 1)[: case.u_dims],
        "scale_in": (case.groups, 1, k)[3 - case.v_dims :],
        "bias": (n,),
        "shift": (n,),
        "dy": (*case.lead, n),
    }
    layout = {"x": case.x_layout, "weight": case.weight_layout, "dy": case.dy_layout}
    made: dict[str, Tensor | None] = {}
    for name, shape in shapes.items():
        t = (sizes[name] * torch.randn(shape, generator=g)).to(device, getattr(torch, kinds[name]))
        if name in ("bias", "shift"):
            t = lay_out(t, case.vector_layout)
        elif name == "scale_out":
            t = lay_out(t.flatten(), case.vector_layout).view(shape)
        elif name == "scale_in" and case.v_dims > 1:
            t = lay_out(t.flatten(0, -2), case.v_layout).view(shape)
        elif name == "scale_in":
            t = lay_out(t, case.vector_layout)
        else:
            t = lay_out(t, layout[name])
        made[name] = fenced(t, case.fence)
    if not case.bias:
        made["bias"] = None
    if not case.shift:
        made["shift"] = None
    return Inputs(**made)  # type: ignore[arg-type]
