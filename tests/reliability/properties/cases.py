"""Random problems: a case is a few literals, so that it can be printed, shrunk and run again; how cases are drawn."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from rlrr_kernels.backends.reference import accumulation_dtype
from tests.oracle import Problem, strided

NAMES = ("x", "weight", "scale_out", "scale_in", "bias", "shift")

#: Memory layouts of a matrix, besides row by row.
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
#: Memory layouts of a vector, and of x or dy with three or more dimensions.
LAYOUTS_1D = ("every third", "off by one element", "one value")
LAYOUTS_ND = ("channels first", "without the first token", "every other token", "one image")

#: Layouts that repeat a few values many times.
REPEATING = {"one column", "one row", "expanded", "one value", "one image"}


def layouts(dims: int) -> tuple[str, ...]:
    """The layouts for a tensor of this many dimensions, the plain one first."""
    return ("contiguous", *(LAYOUTS_1D if dims == 1 else LAYOUTS_2D if dims == 2 else LAYOUTS_ND))


@dataclass(frozen=True)
class Case:
    """One problem. dtypes are names; tuples are in the order of ``NAMES``, ``sizes`` with dy's at the end."""

    lead: tuple[int, ...] = (3,)  # x is [*lead, K]
    n: int = 2
    k: int = 2
    groups: int = 1
    rank: int = 1
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
    also: str = ""  # the property that is checked besides those that always are
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
        """What ``python -m tests.reliability.soak --case`` takes: what differs from the defaults."""
        return repr({name: value for name, value in asdict(self).items() if value != getattr(Case, name)})


class Inputs(Problem):
    """The tensors of a case as a user passes them, and dy in the shape of y."""

    def given(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if t is not None}

    def problem(self) -> Problem:
        """The same in canonical shapes, without a copy where strides allow."""
        n, k = self.weight.shape
        u = self.scale_out if self.scale_out.dim() == 2 else self.scale_out[:, None]
        v = self.scale_in[(None,) * (3 - self.scale_in.dim())]
        return Problem(
            self.x.reshape(-1, k) if k else self.x.new_empty(math.prod(self.x.shape[:-1]), 0),
            self.weight,
            u,
            v,
            self.bias,
            self.shift,
            self.dy.reshape(-1, n) if n else self.dy.new_empty(math.prod(self.dy.shape[:-1]), 0),
        )

    def map(self, change: Any) -> Inputs:
        return Inputs(**{name: None if t is None else change(name, t) for name, t in vars(self).items()})


def lay_out(t: Tensor, how: str) -> Tensor:
    """A tensor in another layout; with the same values, except in layouts that repeat some."""
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
    """The same values and strides in a new storage, with ``count`` NaN before and after."""
    if count == 0 or t.numel() == 0:
        return t
    span = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    storage = t.new_full((span + 2 * count,), float("nan"))
    # copies the gaps between elements too
    storage[count : count + span] = t.as_strided((span,), (1,))
    return storage.as_strided(t.shape, t.stride(), count)


def build(case: Case, device: str) -> Inputs:
    """The tensors of a case, the same each time."""
    g = torch.Generator().manual_seed(case.seed)
    kinds = dict(zip(NAMES, case.dtypes, strict=True)) | {"dy": case.dtypes[0]}
    sizes = dict(zip((*NAMES, "dy"), case.sizes, strict=True))
    n, k = case.n, case.k
    shapes = {
        "x": (*case.lead, k),
        "weight": (n, k),
        "scale_out": (n, case.rank)[: case.u_dims],
        "scale_in": (case.groups, case.rank, k)[3 - case.v_dims :],
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
    for name in ("bias", "shift"):
        if not getattr(case, name):
            made[name] = None
    return Inputs(**made)  # type: ignore[arg-type]


#: Tiles, vectors and units of every backend end at one of these or next to one; and some primes.
EDGES = (1, 2, 3, 5, 7, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320)
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Domain:
    """What a backend takes: pairs of dtypes of x and W, the largest M, N and K, and whether any may be 0."""

    pairs: tuple[tuple[str, str], ...]
    most: int
    empty: bool
    also: tuple[str, ...]
    multiple: int = 1  # N and K are multiples of it
    groups: int = 1 << 30  # no more of them
    ranks: tuple[int, ...] = (1,)
    strided: bool = True  # layouts other than row by row, and x of other than two dimensions


def sizes(most: int, empty: bool) -> st.SearchStrategy[int]:
    """1 to ``most``, half of them edges and their neighbours; sometimes 0."""
    near = sorted({e + d for e in EDGES for d in (-1, 0, 1) if 1 <= e + d <= most})
    found = st.one_of(st.sampled_from(near), st.integers(1, most))
    return st.one_of(*[found] * 7, st.just(0)) if empty else found


@st.composite
def leads(draw: st.DrawFn, domain: Domain) -> tuple[int, ...]:
    """The dimensions of x before the last: zero to three, with a product of at most ``most``."""
    dims = draw(st.sampled_from((1, 1, 1, 0, 2, 3))) if domain.strided else 1
    if dims == 0:
        return ()
    if dims == 1:
        return (draw(sizes(domain.most, domain.empty)),)
    rest, lead = domain.most, []
    for _ in range(dims - 1):
        lead.append(draw(st.integers(0 if domain.empty else 1, 5)))
        rest = max(1, rest // max(1, lead[-1]))
    return (*lead, draw(st.integers(1, rest)))


@st.composite
def cases(draw: st.DrawFn, domain: Domain, also: str) -> Case:
    """Cases of a backend, for which one property is checked besides those that always are."""
    x, weight = draw(st.sampled_from(domain.pairs))
    lead = draw(leads(domain))
    n, k = (domain.multiple * draw(sizes(domain.most // domain.multiple, domain.empty)) for _ in range(2))
    divisors = [g for g in (1, 1, 2, 3, 4, 6, n) if g and n % g == 0 and g <= domain.groups]
    groups, rank = draw(st.sampled_from(divisors)), draw(st.sampled_from(domain.ranks))
    # float64 scales beside narrow ones, and the reverse, are legal
    vectors = tuple(draw(st.sampled_from(("float32", "float32", *FLOATS))) for _ in range(4))
    narrow = "float16" in (x, weight, *vectors)
    # float16 must not overflow here; test_extremes.py is about that
    magnitude = st.sampled_from((1.0, 1.0, 0.125, 0.0) if narrow else (1.0, 1.0, 1e-3, 1e3, 0.0))
    lay = dict.fromkeys(("x_layout", "weight_layout", "dy_layout", "vector_layout", "v_layout"), "contiguous")
    if domain.strided:
        lay["x_layout"], lay["dy_layout"] = (draw(st.sampled_from(layouts(len(lead) + 1))) for _ in range(2))
        lay["weight_layout"], lay["v_layout"] = (draw(st.sampled_from(layouts(2))) for _ in range(2))
        lay["vector_layout"] = draw(st.sampled_from(("contiguous", *LAYOUTS_1D)))
    bias, shift = draw(st.booleans()), draw(st.booleans())
    needs = list(draw(st.tuples(*[st.sampled_from((True, True, False))] * 6)))
    needs[4], needs[5] = needs[4] and bias, needs[5] and shift
    return Case(
        lead=lead,
        n=n,
        k=k,
        groups=groups,
        rank=rank,
        dtypes=(x, weight, *vectors),
        sizes=tuple(draw(magnitude) for _ in range(7)),
        needs=tuple(needs),
        bias=bias,
        shift=shift,
        u_dims=draw(st.sampled_from((1, 2))) if rank == 1 else 2,
        v_dims=draw(st.sampled_from((1, 2, 3) if rank == 1 else (2, 3))) if groups == 1 else 3,
        fence=draw(st.sampled_from((64, 0, 1, 3, 8))) if domain.strided else 64,
        also=also,
        seed=draw(st.integers(0, 2**16)),
        **lay,
    )
