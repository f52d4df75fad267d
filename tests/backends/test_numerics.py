"""The suite that every backend passes: all results against float64, over shapes that fit no tile."""

import itertools
from dataclasses import replace

import pytest
import torch

from rlrr_kernels import use_backend
from rlrr_kernels.backends import choice, reference
from rlrr_kernels.check.yardstick import relative_error
from rlrr_kernels.ops import linear
from tests.oracle import BACKENDS, Answer, Problem, backends_with, check, make_problem, require, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RESULTS = ("y", "dx", "du", "dv", "df")


def solve(p: Problem, backend: str) -> Answer:
    scales = (p.weight, p.scale_out, p.scale_in)
    with use_backend(backend):
        y = linear.forward(p.x, *scales, p.bias, p.shift)
        return Answer(y, linear.grad_input(p.dy, *scales), *linear.grad_scales(p.dy, p.x, *scales, True))


SHAPES = [  # M, N, K, groups
    (1, 1, 1, 1),
    (1, 7, 5, 1),
    (33, 17, 19, 1),
    (197, 10, 48, 1),  # a classifier's few outputs
    (197, 48, 40, 3),
    (70, 30, 72, 3),  # groups of 10 rows: every tile of a group is cut short
    (65, 130, 67, 1),
    (394, 96, 50, 2),  # many splits over the tokens
]
#: For interpreted kernels the others are slow tests: they are larger, and tests/backends/triton has such shapes too.
QUICK = [(shape, torch.bfloat16) for shape in SHAPES if shape[0] * shape[1] < 2000]


@pytest.mark.parametrize(
    ("backend", "case"), backends_with([(shape, dtype) for dtype in DTYPES for shape in SHAPES], quick=QUICK)
)
def test_shapes(backend, case):
    shape, dtype = case
    p = make_problem(*shape, dtype, device=require(backend, dtype))
    check(p, solve(p, backend))


RANKS = [  # M, N, K, groups, rank
    (3, 12, 10, 2, 3),
    (33, 17, 19, 1, 2),
    (70, 30, 72, 3, 8),
    (65, 130, 67, 2, 17),
]


@pytest.mark.parametrize(
    ("backend", "case"),
    backends_with([(case, dtype) for dtype in DTYPES for case in RANKS], quick=[(RANKS[0], torch.bfloat16)]),
)
def test_ranks(backend, case):
    (*shape, rank), dtype = case
    p = make_problem(*shape, dtype, rank=rank, device=require(backend, dtype, rank=rank))
    check(p, solve(p, backend))


@pytest.mark.parametrize(("backend", "layout"), backends_with(["transposed", "rows apart"], quick=["transposed"]))
def test_groups_of_one_row_each(backend, layout):
    p = make_problem(9, 5, 40, 5, rank=9, device=require(backend, rank=9))
    check(p, solve(replace(p, weight=strided(p.weight, layout)), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_terms_of_a_large_rank_are_added_before_the_one(backend):
    p = make_problem(5, 20, 40, 2, rank=128, device=require(backend, rank=128))
    p = replace(p, scale_out=0.01 * p.scale_out)
    u, v = p.scale_out.view(2, 10, 128), p.scale_in
    exact, rounded = 1 + u.double() @ v.double(), 1 + u @ v
    got = reference.scale_matrix(p.scale_out, v, torch.float32).view_as(exact)
    assert relative_error(got, exact) < 1.2 * relative_error(rounded, exact)
    check(p, solve(p, backend))


@pytest.mark.parametrize(("backend", "rank"), backends_with([3, 128], quick=[3]))
def test_a_rank_that_is_zero_but_for_one_gives_what_rank_1_gives(backend, rank):
    """0 u and 0 v add nothing; only du and dv of a zero v or u are zero."""
    one = make_problem(17, 12, 20, 2, device=require(backend, rank=rank))
    at = rank - 2
    u, v = one.scale_out.new_zeros(12, rank), one.scale_in.new_zeros(2, rank, 20)
    u[:, at], v[:, at] = one.scale_out[:, 0], one.scale_in[:, 0]
    got = solve(replace(one, scale_out=u, scale_in=v), backend)
    check(one, replace(got, du=got.du[:, at, None], dv=got.dv[:, at, None]))
    others = [r for r in range(rank) if r != at]
    assert not got.du[:, others].any()
    assert not got.dv[:, others].any()


PAIRS = list(itertools.permutations([torch.float32, torch.bfloat16, torch.float16], 2))


@pytest.mark.parametrize(("backend", "pair"), backends_with(PAIRS, quick=[(torch.float32, torch.bfloat16)]))
def test_weight_of_another_dtype(backend, pair):
    device = require(backend, pair[0])
    p = make_problem(50, 48, 40, 3, *pair, device=device)
    refusal = choice.refusal(backend, p.x, p.weight)
    if refusal:
        pytest.skip(refusal)
    check(p, solve(p, backend))


@pytest.mark.parametrize(("bias", "shift"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_and_shift_each_absent(backend, bias, shift):
    p = make_problem(40, 20, 24, bias=bias, shift=shift, device=require(backend))
    check(p, solve(p, backend))


@pytest.mark.parametrize("how", ["transposed", "sliced", "columns of a wider matrix", "expanded"])
@pytest.mark.parametrize(("backend", "dtype"), backends_with([torch.float32, torch.bfloat16], quick=[torch.float32]))
def test_strides(backend, dtype, how):
    p = make_problem(45, 26, 35, dtype=dtype, device=require(backend, dtype))
    p.dy = strided(p.dy, how)
    if how != "expanded":  # with equal values errors would add up instead of averaging out
        p.x, p.weight = strided(p.x, how), strided(p.weight, how)
    p.bias, p.shift = torch.stack([p.bias, p.bias], 1)[:, 0], torch.stack([p.shift, p.shift], 1)[:, 0]
    check(p, solve(p, backend))


@pytest.mark.parametrize("scales", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_of_another_dtype_and_strides(backend, scales):
    p = make_problem(21, 12, 20, 2, device=require(backend))
    p.scale_out = torch.cat([p.scale_out, p.scale_out], 1).to(scales)[:, :1]
    p.scale_in = p.scale_in.to(scales).mT.contiguous().mT
    p.shift = p.shift.to(scales)
    assert not p.scale_out.is_contiguous()
    check(p, solve(p, backend))


@pytest.mark.parametrize(("backend", "dtype"), backends_with(DTYPES))
def test_power_of_two_scales_equal_a_prescaled_weight_bit_for_bit(backend, dtype):
    """1 + uv in {2, 4, -2, -1/2} rounds nothing, so rescaling must change no bit of the product."""
    p, plain = (
        make_problem(50, 32, 48, 2, dtype, bias=False, shift=False, device=require(backend, dtype)) for _ in range(2)
    )
    p.scale_out = torch.tensor([1.0, 3.0, -3.0, -1.5] * 8, device=p.x.device, dtype=p.scale_out.dtype)[:, None]
    p.scale_in = torch.ones_like(p.scale_in)
    plain.weight = (plain.weight * (1 + p.scale_out)).to(dtype)
    plain.scale_out = torch.zeros_like(p.scale_out)
    a, b = solve(p, backend), solve(plain, backend)
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.dx, b.dx)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("backend", "dtype"), backends_with([torch.float32, torch.bfloat16]))
def test_u_du_equals_v_dv(backend, groups, dtype):
    """In each group both are the sum of P * u v, whatever the rounding of the products."""
    p = make_problem(60, 48, 40, groups, dtype, device=require(backend, dtype))
    got = solve(p, backend)
    left = (p.scale_out.double() * got.du.double()).view(groups, -1).sum(1)
    right = (p.scale_in.double() * got.dv.double()).view(groups, -1).sum(1)
    size = (p.scale_out * got.du).double().abs().sum()
    assert (left - right).abs().max() < 1e-6 * size
    assert left.abs().min() > 1e-3  # not 0 = 0


@pytest.mark.parametrize(("backend", "dtype"), backends_with(DTYPES))
def test_two_runs_agree_bit_for_bit(backend, dtype):
    device = require(backend, dtype)
    interpreted = backend == "triton" and device == "cpu"
    p = make_problem(*((33, 18, 21) if interpreted else (394, 100, 70)), 2 - interpreted, dtype, device=device)
    first, second = solve(p, backend), solve(p, backend)
    for name in RESULTS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_and_nan_stay_in_their_rows(backend):
    """The padding of a tile at an edge must not carry an infinity or NaN from one row into another."""
    p = make_problem(35, 18, 21, device=require(backend))
    p.x[3, 4], p.x[34, 20] = float("inf"), float("nan")
    p.dy[7, 17] = float("nan")
    got = solve(p, backend)
    assert [m for m in range(35) if not torch.isfinite(got.y[m]).all()] == [3, 34]
    assert [m for m in range(35) if not torch.isfinite(got.dx[m]).all()] == [7]
    assert torch.isfinite(got.df).tolist() == [True] * 17 + [False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_df_is_skipped_without_need_shift(backend):
    p = make_problem(40, 20, 24, device=require(backend))
    with use_backend(backend):
        with_df, without = (
            linear.grad_scales(p.dy, p.x, p.weight, p.scale_out, p.scale_in, need_shift) for need_shift in (True, False)
        )
    assert without[2].shape == (0,)
    assert torch.equal(with_df[0], without[0])
    assert torch.equal(with_df[1], without[1])
