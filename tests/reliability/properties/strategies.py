"""Hypothesis strategies for cases: sizes around the edges of tiles, every dtype, layout and missing part."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from tests.reliability.properties.cases import LAYOUTS_1D, Case, layouts

#: Tiles, vectors and units of every backend end at one of these, or one beside it; and some primes.
EDGES = (1, 2, 3, 5, 7, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320)
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Domain:
    """What a backend takes: the dtypes of x and W together, the largest M, N and K, and whether any may be 0."""

    pairs: tuple[tuple[str, str], ...]
    most: int
    empty: bool
    also: tuple[str, ...]
    multiple: int = 1  # N and K are multiples of it
    groups: int = 1 << 30  # no more of them
    strided: bool = True  # layouts other than row by row, and x of other than two dimensions


def sizes(most: int, empty: bool) -> st.SearchStrategy[int]:
    """1 to ``most``, half of them edges and their neighbours; 0 now and then."""
    near = sorted({e + d for e in EDGES for d in (-1, 0, 1) if 1 <= e + d <= most})
    found = st.one_of(st.sampled_from(near), st.integers(1, most))
    return st.one_of(found, found, found, found, found, found, found, st.just(0)) if empty else found


@st.composite
def leads(draw: st.DrawFn, domain: Domain) -> tuple[int, ...]:
    """x's dimensions before the last: none to three, with a product of at most ``most``."""
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
    """Cases of a backend, on which one property is looked at besides those that always are."""
    x, weight = draw(st.sampled_from(domain.pairs))
    lead = draw(leads(domain))
    n, k = (domain.multiple * draw(sizes(domain.most // domain.multiple, domain.empty)) for _ in range(2))
    divisors = [g for g in (1, 1, 2, 3, 4, 6, n) if g and n % g == 0 and g <= domain.groups]
    groups = draw(st.sampled_from(divisors))
    # float64 scales beside narrow ones, and the other way round, are legal
    vectors = tuple(draw(st.sampled_from(("float32", "float32", *FLOATS))) for _ in range(4))
    narrow = "float16" in (x, weight, *vectors)
    # float16 must not overflow here: what happens then is for the extremes to say
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
        dtypes=(x, weight, *vectors),
        sizes=tuple(draw(magnitude) for _ in range(7)),
        needs=tuple(needs),
        bias=bias,
        shift=shift,
        u_dims=draw(st.sampled_from((1, 2))),
        v_dims=draw(st.sampled_from((1, 2, 3))) if groups == 1 else 3,
        fence=draw(st.sampled_from((64, 0, 1, 3, 8))) if domain.strided else 64,
        also=also,
        seed=draw(st.integers(0, 2**16)),
        **lay,
    )
