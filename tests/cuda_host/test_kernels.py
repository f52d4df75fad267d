"""The CUDA kernels' own source, run on a model of a GPU and held to float64 like every backend."""

import itertools

import pytest
import torch
from torch import Tensor

from rlrr_kernels.check.yardstick import relative_error
from tests.cuda_host.machine import BACKWARDS, FORWARDS, LARGE, PASSES, SHUFFLED, SMALL, Machine, rows_apart
from tests.oracle import Answer, Problem, assert_close, check, differentiate, make_problem, strided

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
NAMES = ("y", "dx", "du", "dv", "df")

SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 5, 1),
    (33, 17, 19, 1),
    (197, 10, 48, 1),  # a classifier's few outputs
    (197, 48, 40, 3),  # groups of 16 rows
    (70, 30, 72, 3),  # groups of 10 rows: every tile of a group is cut short, no row is aligned
    (65, 130, 67, 1),
    (394, 32, 64, 1),  # many splits over the tokens
    (150, 288, 264, 1),  # whole vectors; several tiles each way, and more steps than stages
    (140, 280, 136, 2),  # the same in groups that are no multiple of a tile or a step
    (64, 64, 64, 1),  # whole tiles and nothing else
]


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_shapes(machine, m, n, k, groups, dtype, multiprocessors):
    check(p := make_problem(m, n, k, groups, dtype), machine.solve(p, multiprocessors))


def round_to_tf32(t: Tensor) -> Tensor:
    """To the nearest, ties away from zero, as cvt.rna does."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(SINGLE)


def tf32_products(p: Problem, dtype: torch.dtype) -> Answer:
    """The formula with both operands rounded to TF32's 10 bits after the point, multiplied and added in ``dtype``.

    1 + uv is rounded once: a fused multiply-add.
    """
    v_rows = p.scale_in[:, 0].repeat_interleave(p.weight.shape[0] // len(p.scale_in), 0)
    s = (1 + p.scale_out.double() * v_rows.double()).float()
    rescaled = round_to_tf32(p.weight.float() * s).to(dtype)
    y = round_to_tf32(p.x).to(dtype) @ rescaled.mT
    for term in (p.bias, p.shift):
        y = y if term is None else y + term
    dx = round_to_tf32(p.dy).to(dtype) @ rescaled
    products = round_to_tf32(p.dy).to(dtype).mT @ round_to_tf32(p.x).to(dtype) * p.weight.to(dtype)
    du = (products * v_rows.to(dtype)).sum(1, keepdim=True)
    dv = (products * p.scale_out.to(dtype)).unflatten(0, (len(p.scale_in), -1)).sum(1, keepdim=True)
    return Answer(y, dx, du, dv, p.dy.to(dtype).sum(0))


def check_tf32(p: Problem, got: Answer) -> None:
    """float32's yardstick, on operands of TF32's precision; and near the plain formula as well."""
    exact, plain = tf32_products(p, torch.float64), tf32_products(p, SINGLE)
    for name in NAMES:
        assert_close(name, getattr(got, name), getattr(plain, name), getattr(exact, name))


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_tf32(machine, m, n, k, groups, multiprocessors):
    check_tf32(p := make_problem(m, n, k, groups), machine.solve(p, multiprocessors, tf32=True))


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_follows_the_flag(machine, tf32):
    p = make_problem(50, 40, 64)
    s = 1 + p.scale_out.double() @ p.scale_in[0].double()
    exact = p.x.double() @ (p.weight.double() * s).mT + p.bias.double() + p.shift.double()
    got = relative_error(machine.solve(p, tf32=tf32).y, exact)
    # rounded operands are wrong by 2**-11 at most, each
    assert (2**-13 < got < 2**-11) if tf32 else got < 1e-6


def test_tf32_is_not_biased_on_values_of_one_sign(machine):
    """After a ReLU all errors of cut operands point one way and add up: 3.5e-4 and more."""
    p = make_problem(300, 40, 256)
    p.x, p.dy, p.scale_out, p.scale_in = p.x.relu(), p.dy.abs(), p.scale_out.abs(), p.scale_in.abs()
    p.weight = p.weight.abs()
    got, exact = machine.solve(p, tf32=True), differentiate(p, torch.float64)
    for name in ("y", "dx", "du", "dv"):
        assert relative_error(getattr(got, name), getattr(exact, name)) < 2**-13, name


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("shape", [(50, 48, 40, 3), (70, 30, 67, 3), (70, 264, 200, 1)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [pair for pair in itertools.product([SINGLE, HALF, BF16], repeat=2) if pair[0] != pair[1]],
    ids=str,
)
def test_weight_of_another_dtype(machine, dtype, weight_dtype, shape, multiprocessors):
    p = make_problem(*shape, dtype, weight_dtype)
    check(p, machine.solve(p, multiprocessors))
    if dtype is SINGLE:
        check_tf32(p, machine.solve(p, multiprocessors, tf32=True))


@pytest.mark.parametrize(("bias", "shift"), list(itertools.product([False, True], repeat=2)))
def test_bias_and_shift_each_absent(machine, bias, shift):
    check(p := make_problem(40, 20, 24, bias=bias, shift=shift), machine.solve(p))


STRIDED = ["transposed", "sliced", "rows apart", "off by one element", "one row"]


# equal values round alike and to one side, which float32's yardstick bears and bfloat16's does not
@pytest.mark.parametrize(("how", "dtype"), [*itertools.product(STRIDED, [SINGLE, BF16]), ("expanded", SINGLE)], ids=str)
def test_strides(machine, how, dtype):
    p = make_problem(45, 26, 35, dtype=dtype)
    p.x, p.dy, p.weight = strided(p.x, how), strided(p.dy, how), strided(p.weight, how)
    check(p, machine.solve(p))


@pytest.mark.parametrize("how", ["transposed", "off by one element"])
@pytest.mark.parametrize("shape", [(72, 64, 80), (64, 64, 64)], ids=["edges", "whole tiles"])
@pytest.mark.parametrize("name", ["x", "dy", "weight"])
def test_each_operand_is_read_by_its_own_strides(machine, name, shape, how):
    p = make_problem(*shape, dtype=HALF)
    setattr(p, name, strided(getattr(p, name), how))
    check(p, machine.solve(p))


def far_apart(p: Problem, stride: int) -> Problem:
    """The problem with its matrices' rows ``stride`` elements apart, where memory allows such addresses."""
    try:
        x, dy, weight = (rows_apart(*t.shape, stride, t.dtype).copy_(t) for t in (p.x, p.dy, p.weight))
    except RuntimeError:
        pytest.skip("needs addresses for arrays of 4 GiB, though no memory for them")
    return Problem(x, weight, *p.forward_args[2:], dy)


@pytest.mark.parametrize("stride", [2**31, 2**31 + 1], ids=["vectors", "elements"])
def test_offsets_beyond_int32(machine, stride):
    """Two rows 2**31 elements apart, in y and dx as well; what lies between is never touched."""
    p = make_problem(2, 2, 40, dtype=BF16)
    check(p, machine.solve(far_apart(p, stride), row_stride=stride))


def one_product(dtype: torch.dtype) -> tuple[Problem, Tensor]:
    """K = 1 leaves no order of sums: every bit of y is known, down to subnormal values and ties."""
    p = make_problem(300, 40, 1, dtype=dtype, bias=False, shift=False)
    p.x *= 2.0 ** torch.randint(-12, 4, p.x.shape, generator=torch.Generator().manual_seed(0))
    s = (1 + p.scale_out.double() * p.scale_in[0].double()).float()
    rescaled = (p.weight.float() * s).to(dtype)
    return p, (p.x.double() @ rescaled.double().mT).float().to(dtype)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_one_product_is_rounded_once_each_way(machine, dtype):
    p, y = one_product(dtype)
    assert torch.equal(machine.solve(p, passes=("forward",)).y, y)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_power_of_two_scales_equal_a_prescaled_weight_bit_for_bit(machine, dtype, sign, tf32):
    """1 + uv = 2 or 4 (or -2, -1/2) rounds nothing, so rescaling must change no bit of the product."""
    p = make_problem(50, 32, 48, 2, dtype, bias=False, shift=False)
    pick = torch.arange(32)[:, None] % 2
    p.scale_out = 1.0 + 2.0 * pick if sign > 0 else 1.0 - 0.5 * pick
    p.scale_in = torch.full_like(p.scale_in, 1.0 if sign > 0 else -3.0)
    scale = 1 + p.scale_out * p.scale_in[0, 0, 0]
    assert set(scale.flatten().tolist()) == ({2.0, 4.0} if sign > 0 else {-2.0, -0.5})
    plain = make_problem(50, 32, 48, 2, dtype, bias=False, shift=False)
    plain.weight = (plain.weight.float() * scale).to(dtype)
    plain.scale_out = torch.zeros_like(plain.scale_out)
    a, b = machine.solve(p, tf32=tf32), machine.solve(plain, tf32=tf32)
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.dx, b.dx)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_u_du_equals_v_dv(machine, groups, dtype):
    """Both are the sum of P * u v, whatever the rounding of the products; per group."""
    p = make_problem(150, 48, 40, groups, dtype)
    got = machine.solve(p)
    left = (p.scale_out * got.du).double().view(groups, -1).sum(1)
    right = (p.scale_in * got.dv).double().view(groups, -1).sum(1)
    size = (p.scale_out * got.du).double().abs().sum()
    assert (left - right).abs().max() < 1e-6 * size
    assert left.abs().min() > 1e-3  # not 0 = 0


def same(a: Answer, b: Answer) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in NAMES)


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(SINGLE, SINGLE), (BF16, BF16), (BF16, SINGLE)], ids=str)
@pytest.mark.parametrize("k", [72, pytest.param(67, marks=pytest.mark.slow)])
def test_no_order_of_blocks_or_warps_changes_a_bit(machine, k, dtype, weight_dtype, multiprocessors):
    p = make_problem(150, 96, k, 3, dtype, weight_dtype)
    first = machine.solve(p, multiprocessors)
    check(p, first)
    for tf32 in (False, True) if dtype is SINGLE else (False,):
        first = machine.solve(p, multiprocessors, tf32=tf32)
        assert same(first, machine.solve(p, multiprocessors, tf32=tf32))
        for blocks, warps in [(BACKWARDS, FORWARDS), (FORWARDS, BACKWARDS)]:
            assert same(first, machine.solve(p, multiprocessors, tf32=tf32, blocks=blocks, warps=warps))
        for seed in range(3):
            assert same(first, machine.solve(p, multiprocessors, tf32=tf32, warps=SHUFFLED, seed=seed))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
def test_infinity_and_nan_reach_only_what_they_should(machine, dtype):
    """An edge tile's padding must not carry an inf or nan of one row into another."""
    p = make_problem(35, 18, 21, dtype=dtype)
    p.x[3, 4], p.x[34, 20] = float("inf"), float("nan")
    finite = torch.isfinite(machine.solve(p).y).all(1)
    assert not finite[3]
    assert not finite[34]
    assert finite.sum() == 33


#: An infinite scale makes NaN of the zeros that a product is padded with: not so in the other results.
SPARED = {"scale_out": ("dx", "du", "dv", "df"), "scale_in": ("y", "du", "dv", "df")}


def with_infinity(p: Problem, name: str, place: int) -> Problem:
    """Positive numbers, among which the infinity at this place of one tensor's storage stays one in every result."""
    for positive in ("x", "dy", "weight", "scale_out", "scale_in"):
        setattr(p, positive, getattr(p, positive).abs() + 0.25)
    getattr(p, name).view(-1)[place] = float("inf")
    return p


def assert_as_infinite(p: Problem, got: Answer, names: tuple[str, ...], context: object) -> None:
    """The results of these names are infinite where the formula's are, finite elsewhere, and nowhere NaN."""
    exact = differentiate(p, torch.float64)
    for name in names:
        ours, theirs = getattr(got, name), getattr(exact, name)
        assert torch.equal(ours.isposinf(), theirs.isposinf()), f"{name}, {context}"
        assert torch.equal(ours.isfinite(), theirs.isfinite()), f"{name}, {context}"


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize(("dtype", "tf32"), [(BF16, False), (SINGLE, False), (SINGLE, True)], ids=str)
@pytest.mark.parametrize("shape", [(70, 120, 72, 3), (35, 18, 21, 1)], ids=["vectors", "elements"])
def test_beyond_every_edge_an_infinity_finds_no_zero(machine, shape, dtype, tf32, multiprocessors):
    """Tokens, depth, rows of a group of 40 and columns all end inside a tile: padding must not make NaN of it."""
    for name, place in itertools.product(("x", "dy", "weight", "scale_out", "scale_in"), (0, -1)):
        p = with_infinity(make_problem(*shape, dtype), name, place)
        got = machine.solve(p, multiprocessors, tf32=tf32)
        assert_as_infinite(p, got, SPARED.get(name, NAMES), f"{name} at {place}")


def test_df_is_skipped_unless_asked_for(machine):
    p = make_problem(40, 20, 24)
    with_df, without = machine.solve(p), machine.solve(p, need_shift=False)
    assert without.df.shape == (0,)
    assert torch.equal(with_df.du, without.du)
    assert torch.equal(with_df.dv, without.dv)


def test_more_multiprocessors_mean_more_splits(machine: Machine):
    """A tile of G alone on a large GPU shares its tokens out; the sums stay within the yardstick."""
    p = make_problem(2000, 24, 40, dtype=BF16)
    few, many = machine.solve(p, LARGE, passes=("grad_scales",)), machine.solve(p, 108, passes=("grad_scales",))
    assert not torch.equal(few.du, many.du)
    for name in ("du", "dv", "df"):
        assert torch.allclose(getattr(few, name), getattr(many, name), rtol=1e-4, atol=1e-3)
    check(p, machine.solve(p, 108))


@pytest.mark.parametrize(("passed", "large", "small"), [("forward", 4, 12), ("grad_input", 4, 12)])
def test_tiles_grow_where_multiprocessors_are_few(machine, passed, large, small):
    p = make_problem(197, 130, 136, dtype=HALF)
    for multiprocessors, blocks in ((LARGE, large), (SMALL, small)):
        machine.solve(p, multiprocessors, passes=(passed,))
        assert machine.blocks_launched() == blocks


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize(("dtype", "tf32"), [(HALF, False), (SINGLE, True)], ids=str)
@pytest.mark.parametrize("passed", PASSES)
def test_ldmatrix_meets_no_bank_conflict(machine, passed, dtype, tf32, multiprocessors):
    machine.solve(make_problem(130, 130, 136, dtype=dtype), multiprocessors, tf32=tf32, passes=(passed,))
    assert machine.bank_conflicts() == 0
