"""Extreme values and sizes, on every backend: the results are those of the formula.

There are three exceptions. Where u or v is infinite, GPU kernels may give NaN for an infinity in y and dx, because they
pad edges with zeros. Where GPU kernels split the tokens among blocks, an infinity in W meets parts of G whose signs may
differ, which gives NaN where the formula gives an infinity. The CPU kernels for bfloat16 take subnormal numbers for
zero, as the AVX-512 instructions for bfloat16 do.
"""

from __future__ import annotations

import itertools
import math
import mmap
import tempfile

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rlrr_kernels import rescaled_linear, use_backend
from rlrr_kernels.backends import reference
from tests.backends import test_numerics
from tests.cuda_host.machine import LARGE, SMALL
from tests.oracle import (
    Answer,
    Problem,
    assert_close,
    backends_with,
    check,
    device_of,
    differentiate,
    make_problem,
    require,
)
from tests.reliability.properties.solvers import base_machine, hopper_machine, missing, own_instructions

HALF, BF16, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
RESULTS = ("y", "dx", "du", "dv", "df")
HOSTS = ("cuda_host", "cuda_host_large", "hopper_host")
BACKENDS = [
    "reference",
    "panels",
    "cpu",
    "triton",
    *(pytest.param(b, marks=pytest.mark.gpu) for b in ("gluon", "cuda")),
    *HOSTS,
]
INF, NAN = math.inf, math.nan

#: NumPy's, of which Triton's interpreter is made.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def problem(backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int], **given: bool) -> Problem:
    """A problem on the backend's device; skips what the backend does not take. Hopper's kernels need other shapes."""
    if backend not in HOSTS:
        return make_problem(*shape, dtype, device=require(backend, dtype), **given)
    if reason := missing(backend):
        pytest.skip(reason)
    if dtype is DOUBLE or (backend == "hopper_host" and dtype is SINGLE):
        pytest.skip(f"it does not compute in {dtype}")
    if backend == "hopper_host":
        shape = (shape[0], 16 * shape[3], 8 * shape[2], 1)
    return make_problem(*shape, dtype, **given)


def solve(p: Problem, backend: str) -> Answer:
    if backend == "hopper_host":
        return hopper_machine().solve(p, 3)
    if backend in HOSTS:
        return base_machine().solve(p, LARGE if backend == "cuda_host_large" else SMALL)
    return test_numerics.solve(p, backend)


@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_u_v_is_minus_one_the_weight_vanishes(backend, dtype):
    """W' is exactly 0: y is b + f and dx is 0, bit for bit; u and v still train."""
    p = problem(backend, dtype, (19, 12, 21, 2))
    p.scale_out, p.scale_in = torch.full_like(p.scale_out, 4.0), torch.full_like(p.scale_in, -0.25)
    got = solve(p, backend)
    expected = p.bias.to(p.shift.dtype) + p.shift
    assert torch.equal(got.y, expected.to(dtype).expand_as(got.y))
    assert torch.equal(got.dx, torch.zeros_like(got.dx))
    exact, plain = (differentiate(p, kind) for kind in (DOUBLE, p.scale_out.dtype))
    assert exact.du.abs().min() > 1e-3
    for name in ("du", "dv", "df"):
        assert_close(name, getattr(got, name), getattr(plain, name), getattr(exact, name))


@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_u_or_v_is_zero_it_is_a_plain_linear_layer(backend, dtype):
    """W' is W bit for bit: u = 0 and v = 0 give the same bits, and the reference gives those of nn.Linear."""
    p = problem(backend, dtype, (19, 12, 21, 2))
    u, v = p.scale_out, p.scale_in
    p.scale_out = torch.zeros_like(u)
    no_u = solve(p, backend)
    check(p, no_u)
    p.scale_out, p.scale_in = u, torch.zeros_like(v)
    no_v = solve(p, backend)
    assert torch.equal(no_u.y, no_v.y)
    assert torch.equal(no_u.dx, no_v.dx)
    assert torch.equal(no_u.dv, torch.zeros_like(v))
    assert torch.equal(no_v.du, torch.zeros_like(u))
    if backend == "reference":
        assert torch.equal(no_u.y, F.linear(p.x, p.weight, (p.bias.to(u.dtype) + p.shift).to(dtype)))
        assert torch.equal(no_u.dx, p.dy @ p.weight)


def kinds(t: Tensor) -> Tensor:
    """0 finite, 1 inf, 2 -inf, 3 NaN."""
    return t.isposinf() + 2 * t.isneginf() + 3 * t.isnan()


def assert_kinds(got: Answer, formula: Answer, padded: tuple[str, ...], context: object) -> None:
    """NaN, inf and -inf where the formula has them; results named in ``padded`` may have NaN for an infinity."""
    for name in RESULTS:
        ours, theirs = kinds(getattr(got, name)), kinds(getattr(formula, name))
        where = f"{name} with {context}"
        assert torch.equal(ours > 0, theirs > 0), f"{where}: not finite in other places than the formula's"
        assert (ours[theirs == 3] == 3).all(), f"{where}: finite or infinite where the formula is NaN"
        if name in padded:
            assert ((ours == theirs) | (ours == 3)).all(), f"{where}: an infinity of the wrong sign"
        else:
            assert torch.equal(ours, theirs), f"{where}: another infinity, or NaN for one"


@pytest.mark.parametrize(("backend", "dtype"), backends_with([SINGLE, BF16, HALF, DOUBLE], BACKENDS))
def test_infinity_and_nan_go_where_the_formula_takes_them(backend, dtype):
    """One such value in one tensor, first or last, among positive numbers, so that infinities do not cancel."""
    # the interpreter takes seconds
    for shape in ((9, 6, 7, 1),) if backend == "triton" else ((9, 6, 7, 3), (5, 1, 1, 1)):
        for name in ("x", "weight", "scale_out", "scale_in", "bias", "shift", "dy"):
            for value, place in ((INF, 0), (-INF, -1), (NAN, -1)):
                p = problem(backend, dtype, shape)
                for positive in ("x", "weight", "scale_out", "scale_in", "dy"):
                    setattr(p, positive, getattr(p, positive).abs())
                getattr(p, name).view(-1)[place] = value
                formula = differentiate(p, DOUBLE)
                assert not all(getattr(formula, result).isfinite().all() for result in RESULTS)
                padded = {"scale_out": ("y",), "scale_in": ("dx",)}.get(name, ())
                if backend in ("reference", "panels", "cpu"):
                    padded = ()
                assert_kinds(solve(p, backend), formula, padded, f"{name} {value} at {place}, {shape}")


@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["u v", "W'", "y and dx", "G"])
def test_overflow_is_infinite_where_the_formula_overflows(backend, dtype, what):
    """Values far beyond the largest number or far below it, so that the order of sums does not matter."""
    p = problem(backend, dtype, (9, 6, 7, 3), bias=False, shift=False)
    for name in ("x", "weight", "scale_out", "scale_in", "dy"):
        setattr(p, name, getattr(p, name).abs() + 0.5)
    huge = 2.0 ** (14 if dtype is HALF else 120)
    if what == "u v":
        p.scale_out[1], p.scale_in[0, 0, 2] = 2.0**100, 2.0**100  # inf in float32 at row 1 and column 2 of W'
    elif what == "W'":
        p.weight[2, 3], p.scale_out[2] = huge, 4096.0
    elif what == "y and dx":
        p.x[4], p.dy[3] = huge, huge
        p.scale_out *= 256
    else:
        if dtype is HALF:
            pytest.skip("products of float16 do not overflow float32")
        p.x[4], p.dy[4, 5] = huge, huge
    # scale gradients are float32, so the formula's as well
    formula, wide = differentiate(p, dtype, keep=("weight", "scale_out", "scale_in")), differentiate(p, SINGLE)
    formula = Answer(formula.y, formula.dx, wide.du, wide.dv, wide.df)
    assert not all(getattr(formula, name).isfinite().all() for name in RESULTS)
    assert_kinds(solve(p, backend), formula, (), what)


def test_float16_overflows_only_if_the_sum_with_its_offset_does():
    """The formula rounds before it adds b and f; the kernels round once."""
    p = problem("cuda_host", HALF, (1, 8, 1, 1))
    for t, value in ((p.x, 256.0), (p.weight, 256.0), (p.scale_out, 0.0), (p.bias, -1024.0), (p.shift, 0.0)):
        t.fill_(value)
    assert differentiate(p, HALF).y.isinf().all()
    assert (solve(p, "cuda_host").y == 65536 - 1024).all()


def products(backend: str, dtype: torch.dtype, scale: float) -> tuple[Problem, Tensor]:
    """A problem with K = 1, where no order of sums matters, and y, of which every bit is known."""
    p = problem(backend, dtype, (40, 16, 1, 1), bias=False, shift=False)
    p.x, p.weight = p.x[:, :1].contiguous(), p.weight[:, :1].contiguous()
    p.scale_in = p.scale_in[..., :1].contiguous()
    p.x = (p.x.double() * scale).to(dtype)
    s = reference.scale_matrix(p.scale_out, p.scale_in, p.scale_out.dtype)
    if backend in HOSTS or p.x.is_cuda:  # a fused multiply-add
        s = reference.scale_matrix(p.scale_out, p.scale_in, DOUBLE).float()
    rescaled = (p.weight.to(s.dtype) * s).to(dtype)
    y = p.x.double() @ rescaled.double().mT
    return p, (y if dtype is DOUBLE else y.float()).to(dtype)


#: The exponent of two of the smallest positive number.
SMALLEST = {HALF: -24, BF16: -133, SINGLE: -149, DOUBLE: -1074}


@pytest.mark.parametrize("dtype", [SINGLE, BF16, HALF, DOUBLE], ids=str)
@pytest.mark.parametrize(
    "backend", ["reference", "cpu", "triton", pytest.param("cuda", marks=pytest.mark.gpu), *HOSTS[:2]]
)
def test_subnormal_numbers_are_not_flushed(backend, dtype):
    p, y = products(backend, dtype, 2.0 ** (SMALLEST[dtype] + 6))
    smallest = torch.finfo(dtype).smallest_normal
    assert ((p.x != 0) & (p.x.abs() < smallest)).any()
    assert ((y != 0) & (y.abs() < smallest)).sum() > 100
    if backend == "triton" and dtype is BF16 and p.x.device.type == "cpu":
        pytest.skip("Triton's interpreter does not widen subnormal bfloat16 numbers; GPUs do")
    got = solve(p, backend).y
    if backend == "cpu" and dtype is BF16 and own_instructions() in ("avx512_bf16", "amx"):
        # these instructions take subnormal operands and results for zero
        y = torch.where((p.x.abs() < smallest) | (y.abs() < smallest), 0.0, y)
    assert torch.equal(got, y)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
@pytest.mark.parametrize("backend", ["reference", "panels", "cpu"])
def test_set_flush_denormal_flushes_and_changes_nothing_else(backend, dtype):
    p = problem(backend, dtype, (19, 12, 21, 2))
    small, y = products(backend, dtype, 2.0 ** (SMALLEST[dtype] + 6))
    before = solve(p, backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mode holds for the calling thread alone
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot")
    try:
        after, flushed = solve(p, backend), solve(small, backend).y
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
    assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in RESULTS)
    assert torch.equal(flushed, torch.zeros_like(y))


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_negative_zero_is_zero(backend, dtype):
    p = problem(backend, dtype, (9, 6, 7, 3))
    zeros = {"x": (slice(0, 3),), "weight": (slice(2, 4),), "scale_out": (0,), "dy": (slice(None), 1), "bias": (3,)}
    answers = []
    for zero in (0.0, -0.0):
        for name, place in zeros.items():
            getattr(p, name)[place] = zero
        answers.append(solve(p, backend))
    check(p, answers[0])
    for name in RESULTS:
        assert torch.equal(getattr(answers[0], name), getattr(answers[1], name)), name


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", pytest.param("cuda", marks=pytest.mark.gpu), "auto"])
def test_sizes_of_zero_and_one(backend):
    """M, N and K of 0, 1 and 2: shapes as nn.Linear's, gradients as the formula's."""
    device = "cpu" if backend == "auto" else require(backend)
    for m, n, k in itertools.product((0, 1, 2), repeat=3):
        for groups in {1, max(n, 1)}:
            g = torch.Generator().manual_seed(9 * m + 3 * n + k)
            shapes = {"x": (m, k), "weight": (n, k), "u": (n, 1), "v": (groups, 1, k), "bias": (n,), "shift": (n,)}
            tensors = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes.values()]
            with use_backend(backend):
                y = rescaled_linear(*tensors)
                grads = torch.autograd.grad(y, tensors, torch.ones_like(y))
            wanted = reference.formula(*tensors)
            assert y.shape == (m, n)
            torch.testing.assert_close(y, wanted)
            for name, got, exact in zip(
                shapes, grads, torch.autograd.grad(wanted, tensors, torch.ones_like(y)), strict=True
            ):
                # sums of at most two terms, for which the default tolerance is enough
                torch.testing.assert_close(got, exact, msg=lambda text, at=(name, m, n, k): f"{at}: {text}")


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE, BF16], ids=str)
@pytest.mark.parametrize("offset", [BF16, HALF, SINGLE], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bias_and_shift_are_added_in_the_type_of_the_sums(backend, offset, dtype):
    """The sum of two narrow vectors, 1 + 2**-12, needs more digits than they have."""
    device = require(backend, dtype)
    p = make_problem(3, 4, 5, dtype=dtype, device=device)
    p.x.zero_()
    p.bias, p.shift = (torch.full((4,), value, dtype=offset, device=device) for value in (1.0, 2.0**-12))
    assert torch.equal(solve(p, backend).y, torch.full((3, 4), 1 + 2.0**-12, device=device).to(dtype))


def far(t: Tensor, stride: int, columns: bool = False) -> Tensor:
    """The same values, with rows (or columns) ``stride`` elements apart in memory that is not touched elsewhere."""
    rows, cols = t.shape
    span = ((cols if columns else rows) - 1) * stride + (rows if columns else cols)
    with tempfile.TemporaryFile() as file:  # sparse: only pages that are touched exist
        try:
            file.truncate(span * t.element_size())
            memory = mmap.mmap(file.fileno(), 0)
        except OSError as error:
            pytest.skip(f"needs a sparse file of {span * t.element_size() >> 30} GiB: {error}")
    storage = torch.frombuffer(memory, dtype=t.dtype)
    return storage.as_strided((rows, cols), (1, stride) if columns else (stride, 1)).copy_(t)


@pytest.mark.parametrize("dtype", [SINGLE, BF16, DOUBLE], ids=str)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("backend", ["reference", "panels", "cpu", "triton"])
def test_offsets_beyond_two_to_the_31(backend, columns, dtype):
    """x, dy and W each with rows or columns 2**31 + 5 elements apart."""
    if device_of(backend) != "cpu":
        pytest.skip("these tensors are the CPU's; tests/backends/triton has the GPU's")
    require(backend, dtype)
    p = make_problem(3, 2, 3, dtype=dtype)
    packed = solve(p, backend)
    for name in ("x", "dy", "weight"):
        q = Problem(**vars(p))
        setattr(q, name, far(getattr(p, name), 2**31 + 5, columns))
        got = solve(q, backend)
        check(p, got)
        assert torch.equal(got.df, packed.df)
