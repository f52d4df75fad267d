"""What holds for every case on every backend; each function raises AssertionError where it does not."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from tests.oracle import Answer, Problem, assert_close, differentiate
from tests.reliability.properties.cases import NAMES, REPEATING, Case, Inputs, build
from tests.reliability.properties.solvers import Backend, Results

#: Result -> field of an Answer.
FIELDS = {"y": "y", "dx": "dx", "dscale_out": "du", "dscale_in": "dv", "dbias": "df", "dshift": "df"}


def step(dtype: torch.dtype) -> float:
    """The distance between subnormal values of a dtype, which underflow may cost."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def sizes(p: Problem) -> Answer:
    """For each result the sum of its terms' absolute values, S's two terms included; errors are relative to it."""
    positive = {name: t if t is None else t.abs() for name, t in vars(p).items()}
    return differentiate(Problem(**positive), torch.float64)


def bounds(case: Case, p: Problem, size: Answer) -> Answer:
    """How far each element may be from the exact one, by the standard analysis of rounding errors.

    A sum of n products in any order has an error of at most n u times the sum of their sizes. W' and the result are
    each rounded once more to x's dtype, and bias + shift may be.
    """
    narrow, wide = torch.finfo(case.dtype), torch.finfo(case.wide)
    # a sum that tensor cores truncate loses twice as much as a rounded one: eps, which is twice the unit roundoff
    terms = (p.weight.shape[1], case.n, case.m + case.k, case.m + case.n, case.m)
    y, dx, du, dv, df = (wide.eps * (count + case.rank + 7) for count in terms)
    lost = step(case.dtype)
    return Answer(
        size.y * (2 * narrow.eps + y) + lost * (1 + p.x.double().abs().sum(1, keepdim=True)),
        size.dx * (2 * narrow.eps + dx) + lost * (1 + p.dy.double().abs().sum(1, keepdim=True)),
        size.du * du + step(case.wide) * (1 + case.m * case.k),
        size.dv * dv + step(case.wide) * (1 + case.m * case.n),
        size.df * df,
    )


def within(name: str, got: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Element by element, so that one wrong element among thousands shows."""
    finfo = torch.finfo(got.dtype)
    allowed = bound + finfo.eps * exact.abs() + step(got.dtype)
    wrong = ~((got.double() - exact).abs() <= allowed)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(at)}: {got[at].item()}, exact {exact[at].item()}, bound {allowed[at].item():.2e}; "
            f"{int(wrong.sum())} of {wrong.numel()} are wrong"
        )


def accurate(case: Case, inputs: Inputs, got: Results) -> None:
    """Shape, dtype, the yardstick of ``tests/oracle.py``, and the bound of each element."""
    p = inputs.problem()
    exact, size = differentiate(p, torch.float64), sizes(p)
    plain = differentiate(p, case.dtype, keep=("weight", "scale_out", "scale_in", "bias", "shift"))
    plain_wide, bound = differentiate(p, case.wide), bounds(case, p, size)
    repeats = REPEATING & {case.x_layout, case.weight_layout, case.dy_layout, case.vector_layout, case.v_layout}
    for name, field in FIELDS.items():
        if name not in got:
            continue
        given = inputs.dy if name == "y" else getattr(inputs, name[1:])
        like = (plain if field in ("y", "dx") else plain_wide).__dict__[field].reshape(given.shape).to(given.dtype)
        wanted, terms = (getattr(a, field).reshape(given.shape) for a in (exact, size))
        within(name, got[name], wanted, getattr(bound, field).reshape(given.shape))
        # errors of equal terms have one sign and add up, so the plain formula's error says nothing about ours
        if repeats:
            continue
        # where terms cancel, or few values are rounded, either error may be smaller by one rounding of the terms
        condition = float(terms.norm() / wanted.norm().clamp_min(1e-300))
        luck = torch.finfo(case.wide).eps * condition
        if given.dtype.itemsize == 2:
            luck += torch.finfo(given.dtype).eps * condition / max(wanted.unique().numel(), 1) ** 0.5
        if p.x.is_cuda and case.dtype.itemsize == 2:
            luck += case.m / 16 * torch.finfo(case.wide).eps / 2  # as tests.oracle.check allows
        assert_close(name, got[name], like, wanted, luck)
    if "dweight" in got:
        u, v = p.scale_out.double().view(case.groups, case.n // case.groups, case.rank), p.scale_in.double()
        s = 1 + u @ v
        wanted = p.dy.double().mT @ p.x.double() * s.flatten(0, 1)
        s_size = 1 + u.abs() @ v.abs()
        size_w = p.dy.double().abs().mT @ p.x.double().abs() * s_size.flatten(0, 1)
        assert got["dweight"].dtype is inputs.weight.dtype
        relative = 2 * torch.finfo(case.dtype).eps + torch.finfo(case.wide).eps * (case.m + case.rank + 7)
        lost = step(case.dtype) * s_size.flatten(0, 1)
        within("dweight", got["dweight"], wanted, relative * size_w + lost)


def untouched(inputs: Inputs, before: dict[str, Tensor]) -> None:
    """No bit of the inputs' storages has changed, fences and gaps included."""
    for name, now in storages(inputs).items():
        assert torch.equal(bits(now), bits(before[name])), f"{name}: memory in or around it has been written to"


def storages(inputs: Inputs) -> dict[str, Tensor]:
    return {
        name: torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).clone()
        for name, t in inputs.given().items()
    }


def bits(t: Tensor) -> Tensor:
    """As integers, where NaN equals NaN and 0 differs from -0."""
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def equal(got: Results, other: Results, names: tuple[str, ...]) -> None:
    for name in names:
        if name in got and name in other:
            a, b = got[name], other[name]
            assert torch.equal(bits(a), bits(b)), (
                f"{name}: {int((bits(a) != bits(b)).sum())} of {a.numel()} bits differ"
            )


def layouts_change_no_bit(backend: Backend, case: Case, inputs: Inputs, got: Results) -> None:
    """Contiguous copies give the same bits, where no BLAS decides the order of sums."""
    packed = inputs.map(lambda name, t: t.contiguous().clone())
    if not backend.same_bits(case):
        return accurate(case, packed, backend.solve(case, packed))
    names = ("y", "dx", "dscale_out", "dscale_in")
    if "dscale_out" in got or "dscale_in" in got:  # else plain PyTorch sums dy
        names = (*names, "dbias", "dshift")
    equal(got, backend.solve(case, packed), names)


def powers_of_two_change_no_bit(backend: Backend, case: Case, inputs: Inputs) -> None:
    """Where S = 1 + u v is a power of two, nothing is rounded: the bits are those of a weight scaled before."""
    g = torch.Generator().manual_seed(case.seed)
    device = inputs.x.device
    # half of float16's smallest numbers would be rounded
    least = 0 if "float16" in case.dtypes[:2] else -2
    power = 2.0 ** torch.randint(least, 4, (case.n,), generator=g) * (
        torch.randint(0, 2, (case.n,), generator=g) * 2 - 1
    )
    v = 2.0 ** torch.randint(-2, 3, (case.groups,), generator=g)
    u = (power.view(case.groups, -1) - 1) / v[:, None]

    def scaled(name: str, t: Tensor) -> Tensor:
        if name == "scale_out":
            filled = torch.zeros_like(t, memory_format=torch.contiguous_format)
            filled.view(case.n, case.rank)[:, 0] = u.flatten().to(t)  # so that one term of u v is not 0
            return filled
        if name == "scale_in":
            return v.view(-1, *[1] * (t.dim() - 1)).to(t) * torch.ones_like(t)
        return t

    def before(name: str, t: Tensor) -> Tensor:
        if name == "weight":
            return (t.double() * power.to(device)[:, None]).to(t.dtype)
        return torch.zeros_like(t) if name in ("scale_out", "scale_in") else t

    # rows that share memory cannot be scaled one by one, and huge values would overflow
    tame = dataclasses.replace(case, sizes=(1.0,) * 7, weight_layout="contiguous")
    tame_inputs = build(tame, str(device))
    a, b = (backend.solve(tame, tame_inputs.map(change)) for change in (scaled, before))
    equal(a, b, ("y", "dx"))


def u_du_is_v_dv(case: Case, inputs: Inputs, got: Results) -> None:
    """Both are the sum of P u v over a group, equal within the error bounds of each."""
    if not {"dscale_out", "dscale_in"} <= got.keys() or not case.m * case.n * case.k:
        return
    p = inputs.problem()
    size = sizes(p)
    bound = bounds(case, p, size)
    total = {}
    for name, t, other, allowed in (
        ("u du", p.scale_out, got["dscale_out"], bound.du),
        ("v dv", p.scale_in, got["dscale_in"], bound.dv),
    ):
        t, other = (values.double().reshape(case.groups, -1) for values in (t, other))
        rounded = torch.finfo(got["dscale_out" if name == "u du" else "dscale_in"].dtype)
        lost = rounded.eps * rounded.smallest_normal
        error = (t.abs() * (allowed.reshape(case.groups, -1) + rounded.eps * other.abs() + lost)).sum(1)
        total[name] = (t * other).sum(1), error
    (left, left_error), (right, right_error) = total.values()
    assert ((left - right).abs() <= left_error + right_error).all(), f"u du = {left}, v dv = {right}"


def rows_are_independent(backend: Backend, case: Case, inputs: Inputs, got: Results) -> None:
    """NaN in the other rows of x and dy changes no bit of a row of y and dx."""
    if case.m < 2:
        return
    row = case.seed % case.m

    def alone(spoil: bool) -> Results:
        def copied(name: str, t: Tensor) -> Tensor:
            if name not in ("x", "dy"):
                return t
            # both are new tensors, as a BLAS may choose its order of sums by alignment
            t = t.clone(memory_format=torch.contiguous_format)
            keep = t.view(case.m, t.shape[-1])[row].clone()
            if spoil:
                t.fill_(float("nan")).view(case.m, t.shape[-1])[row] = keep
            return t

        return backend.solve(case, inputs.map(copied))

    mine, other = alone(False), alone(True)
    for name in ("y", "dx"):
        if name in got:
            width = got[name].shape[-1]
            a, b = mine[name].reshape(case.m, width)[row], other[name].reshape(case.m, width)[row]
            assert torch.equal(bits(a), bits(b)), f"{name}: row {row} depends on other rows"


def examine(backend: Backend, case: Case) -> None:
    """Check what always holds for a case, and the property that it asks for."""
    inputs = build(case, backend.device)
    before = storages(inputs)
    got = backend.solve(case, inputs)
    untouched(inputs, before)
    for name in got:
        given = inputs.dy if name == "y" else getattr(inputs, name[1:])
        assert got[name].shape == given.shape, f"{name}: shape {list(got[name].shape)}, expected {list(given.shape)}"
    accurate(case, inputs, got)
    if case.also == "layouts":
        layouts_change_no_bit(backend, case, inputs, got)
    elif case.also == "powers of two":
        powers_of_two_change_no_bit(backend, case, inputs)
    elif case.also == "two runs":
        equal(got, backend.solve(case, inputs), ("y", *(f"d{name}" for name in NAMES)))
    elif case.also == "u du":
        u_du_is_v_dv(case, inputs, got)
    elif case.also == "other rows":
        rows_are_independent(backend, case, inputs, got)
