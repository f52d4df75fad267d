"""Problems, their float64 answers, and the yardstick that measures every backend (``rlrr_kernels.check.yardstick``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlrr_kernels.backends import choice, reference
from rlrr_kernels.check.yardstick import allowed, cut, relative_error

#: Every backend; tests that need a GPU, or a library that is not built, are skipped with the reason.
BACKENDS = [
    pytest.param("reference"),
    pytest.param("panels"),
    pytest.param("cpu"),
    pytest.param("triton"),
    pytest.param("gluon", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def device_of(backend: str) -> str:
    """The device of a backend's tensors; Triton's kernels are interpreted on the CPU where there is no GPU."""
    return "cuda" if backend in ("cuda", "gluon") or (backend == "triton" and torch.cuda.is_available()) else "cpu"


def backends_with(
    dtypes: Iterable[Any], backends: Iterable[Any] = BACKENDS, quick: Sequence[Any] = (torch.bfloat16,)
) -> list[Any]:
    """Parameters ``backend, dtype`` of a test.

    Interpreted kernels take seconds: with dtypes (or other second parameters) that are not in ``quick`` they are slow
    tests.
    """
    found = []
    for backend in backends:
        (name,), marks = getattr(backend, "values", [backend]), getattr(backend, "marks", ())
        for dtype in dtypes:
            slow = name == "triton" and device_of(name) == "cpu" and dtype not in quick
            found.append(pytest.param(name, dtype, id=f"{name}-{dtype}", marks=[*marks, *[pytest.mark.slow] * slow]))
    return found


def require(backend: str, *dtypes: torch.dtype, rank: int = 1) -> str:
    """The backend's device; skips where the backend is not here or does not compute in a dtype or at the rank."""
    if device_of(backend) == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = device_of(backend)
    for dtype in dtypes or (torch.float32,):
        x = torch.empty(1, 1, dtype=dtype, device=device)
        refusal = choice.refusal(backend, x, x, rank)
        if refusal is not None:
            pytest.skip(refusal)
    return device


@dataclass
class Problem:
    """Inputs in canonical shapes: x [M, K], weight [N, K], u [N, r], v [groups, r, K], dy [M, N]."""

    x: Tensor
    weight: Tensor
    scale_out: Tensor
    scale_in: Tensor
    bias: Tensor | None
    shift: Tensor | None
    dy: Tensor

    @property
    def forward_args(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.scale_out, self.scale_in, self.bias, self.shift


@dataclass
class Answer:
    """y and the gradients; ``df`` is that of bias and shift alike."""

    y: Tensor
    dx: Tensor
    du: Tensor
    dv: Tensor
    df: Tensor


def make_problem(
    m: int,
    n: int,
    k: int,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    bias: bool = True,
    shift: bool = True,
    device: str = "cpu",
    seed: int = 0,
    rank: int = 1,
) -> Problem:
    """Random values of the size that training has, with u and v so large that S matters everywhere."""
    g = torch.Generator().manual_seed(seed + 7919 * m + 104729 * n + 1299709 * k)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return Problem(
        x=draw(m, k, dtype=dtype),
        weight=draw(n, k, dtype=weight_dtype or dtype),
        scale_out=draw(n, rank, dtype=wide),
        scale_in=0.5 * draw(groups, rank, k, dtype=wide),
        bias=draw(n, dtype=weight_dtype or dtype) if bias else None,
        shift=draw(n, dtype=wide) if shift else None,
        dy=draw(m, n, dtype=dtype),
    )


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in another layout, with NaN between them, so that reading between them shows."""
    rows, cols = t.shape
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "sliced":
        wide = torch.full((2 * rows, 3 * cols), float("nan"), dtype=t.dtype, device=t.device)
        wide[::2, ::3] = t
        return wide[::2, ::3]
    if how == "rows apart":  # whole vectors still, with NaN after each row's end
        wide = torch.full((rows, (cols + 15) // 8 * 8), float("nan"), dtype=t.dtype, device=t.device)
        wide[:, :cols] = t
        return wide[:, :cols]
    if how == "columns of a wider matrix":
        wide = torch.full((rows, cols + 3), float("nan"), dtype=t.dtype, device=t.device)
        wide[:, 1 : cols + 1] = t
        return wide[:, 1 : cols + 1]
    if how == "off by one element":
        shifted = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(rows, cols)
        return shifted.copy_(t)
    if how == "one row":
        return t[:1].expand(rows, cols)
    assert how == "expanded", how
    return t[:1, :1].expand(rows, cols)


def differentiate(p: Problem, dtype: torch.dtype, keep: tuple[str, ...] = ()) -> Answer:
    """The plain formula and its autograd gradients with tensors cast to ``dtype``.

    ``keep``: fields left in their own dtype.
    """

    def cast(name: str) -> Tensor | None:
        t = getattr(p, name)
        return t if t is None or name in keep else t.to(dtype)

    x, weight, u, v = (cast(name) for name in ("x", "weight", "scale_out", "scale_in"))
    x, u, v = (t.clone().requires_grad_() for t in (x, u, v))
    y = reference.formula(x, weight, u, v, cast("bias"), cast("shift"))
    dy = p.dy.to(y.dtype)
    dx, du, dv = torch.autograd.grad(y, (x, u, v), dy)
    return Answer(y.detach(), dx, du, dv, dy.sum(0))


def assert_close(name: str, got: Tensor, plain: Tensor, exact: Tensor, more: float = 0.0) -> None:
    """Hold a result to the yardstick.

    Args:
        name: of the result, for the message.
        got: the result.
        plain: what the plain formula gives, whose shape and dtype ``got`` must have.
        exact: the result in float64.
        more: relative error allowed beyond the yardstick.
    """
    assert got.shape == plain.shape, f"{name}: shape {list(got.shape)}, expected {list(plain.shape)}"
    assert got.dtype == plain.dtype, f"{name}: dtype {got.dtype}, expected {plain.dtype}"
    ours, bound = relative_error(got, exact), allowed(plain, exact, more)
    theirs = relative_error(plain, exact)
    assert ours <= bound, f"{name}: error {ours:.2e}, the plain formula's {theirs:.2e}, allowed {bound:.2e}"


def check(p: Problem, got: Answer) -> None:
    """Hold all five results of a problem to the yardstick."""
    exact = differentiate(p, torch.float64)
    plain = differentiate(p, p.x.dtype, keep=("weight", "scale_out", "scale_in", "bias", "shift"))
    wide = torch.float64 if p.x.dtype is torch.float64 else torch.float32
    plain_wide = differentiate(p, wide)
    assert_close("y", got.y, plain.y, exact.y)
    assert_close("dx", got.dx, plain.dx, exact.dx)
    for name in ("du", "dv", "df"):
        assert_close(name, getattr(got, name), getattr(plain_wide, name), getattr(exact, name), cut(p.x))
