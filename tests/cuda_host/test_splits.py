"""Depths split among blocks: when the plan does it, how much scratch it takes, and what comes of it."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.cuda_host.machine import BACKWARDS, FORWARDS, LARGE, SHUFFLED, SMALL, Machine
from tests.cuda_host.test_kernels import check_tf32
from tests.oracle import Problem, check, make_problem

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
FEW = 11  # multiprocessors: several steps a split, and fewer for the last
WIDTHS = {"forward": "y", "grad_input": "dx"}


def splits(machine: Machine, name: str, m: int, n: int, k: int, groups: int = 1, **how: object) -> int:
    """Among how many blocks the plan shares a tile's depth out."""
    floats = machine.workspace_floats(name, m, n, k, groups, **how)
    results = m * (n if name == "forward" else k)
    assert floats % results == 0
    return max(1, floats // results)


@pytest.mark.parametrize(
    ("name", "m", "n", "k", "groups"),
    [
        ("forward", 197, 768, 3072, 1),  # the second half of an MLP, one image
        ("forward", 64, 100, 768, 1),  # a classifier
        ("grad_input", 197, 3072, 768, 1),
        ("grad_input", 64, 2304, 96, 3),
    ],
)
def test_deep_products_of_few_tiles_are_split(machine, name, m, n, k, groups):
    assert splits(machine, name, m, n, k, groups) > 1


@pytest.mark.parametrize(
    ("m", "n", "k", "groups"),
    [
        (6304, 768, 768, 1),  # enough tiles
        (12608, 3072, 768, 1),
        (197, 768, 768, 1),  # the second kernel would take longer than the steps it saves
        (400, 1536, 768, 3),  # partial sums would not fit
        (64, 96, 64, 1),  # hardly a step
        (1, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("name", WIDTHS)
def test_what_gains_nothing_is_not_split(machine, name, m, n, k, groups):
    sizes = (m, n, k, groups) if name == "forward" else (m, k, n, groups)
    assert splits(machine, name, *sizes) == 1


def test_one_multiprocessor_has_nothing_to_share_out(machine):
    for name, dtype in itertools.product(WIDTHS, (SINGLE, HALF, BF16)):
        assert splits(machine, name, 9, 1600, 1600, dtype=dtype, multiprocessors=1) == 1


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize("name", WIDTHS)
def test_more_idle_multiprocessors_never_mean_fewer_splits(machine, name, dtype):
    sizes = (16, 64, 4096) if name == "forward" else (16, 4096, 64)
    found = [splits(machine, name, *sizes, dtype=dtype, multiprocessors=count) for count in (1, 2, 4, 16, 64, 256)]
    assert found == sorted(found)
    assert found[-1] > 2 * found[2] > 2


@pytest.mark.parametrize("name", WIDTHS)
def test_scratch_stays_below_two_megabytes(machine, name):
    """Over all that could be split, and more."""
    sizes = (1, 7, 64, 197, 500, 1024)
    for m, n, k in itertools.product(sizes, (1, 40, 768, 16384), (1, 40, 768, 16384)):
        for dtype, multiprocessors in itertools.product((SINGLE, BF16), (132, 4096)):
            floats = machine.workspace_floats(name, m, n, k, dtype=dtype, multiprocessors=multiprocessors)
            assert 4 * floats <= 1_900_000, (m, n, k)


# depths and widths that vectors fit and do not; numbers of steps that splits do not divide
SHAPES = [(9, 20, 1184, 1), (33, 54, 1111, 1), (40, 33, 803, 3)]


def flipped(m: int, n: int, k: int, groups: int) -> tuple[int, int, int, int]:
    """The same for grad_input, whose depth is N."""
    return m, k - k % groups, n, groups


KINDS = [(SINGLE, SINGLE, False), (SINGLE, SINGLE, True), (HALF, HALF, False), (BF16, BF16, False)]
KINDS += [pytest.param(*kind, marks=pytest.mark.slow) for kind in ((BF16, SINGLE, False), (SINGLE, BF16, True))]


@pytest.mark.parametrize(("dtype", "weight_dtype", "tf32"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("multiprocessors", [FEW, SMALL])
def test_split_products(machine, multiprocessors, name, shape, dtype, weight_dtype, tf32):
    sizes = shape if name == "forward" else flipped(*shape)
    assert splits(machine, name, *sizes, dtype=dtype, multiprocessors=multiprocessors) > 1
    p = make_problem(*sizes, dtype, weight_dtype)
    # the other passes need no more multiprocessors than one
    got, alone = machine.solve(p, multiprocessors, tf32=tf32), machine.solve(p, LARGE, tf32=tf32)
    result = WIDTHS[name]
    setattr(alone, result, getattr(got, result))
    (check_tf32 if tf32 else check)(p, alone)


@pytest.mark.parametrize(("bias", "shift"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("n", [20, 21])
def test_bias_and_shift_are_added_once(machine, n, bias, shift):
    assert splits(machine, "forward", 9, n, 1600, multiprocessors=SMALL) > 1
    check(p := make_problem(9, n, 1600, dtype=BF16, bias=bias, shift=shift), machine.solve(p, SMALL))


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_padded_rows_of_the_result(machine, dtype):
    """Rows further apart than they are wide: what lies between them is not written, and stays unaligned."""
    for stride in (24, 27):
        p = make_problem(9, 20, 1600, dtype=dtype)
        y = machine.solve(p, SMALL, passes=("forward",), row_stride=stride).y
        assert y.stride() == (stride, 1)
        assert torch.equal(y, machine.solve(p, SMALL, passes=("forward",)).y)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_no_order_of_blocks_or_warps_changes_a_bit(machine, dtype):
    for name, sizes in (("forward", (33, 70, 1111, 1)), ("grad_input", (33, 1200, 70, 3))):
        p = make_problem(*sizes, dtype)
        first = getattr(machine.solve(p, SMALL, passes=(name,)), WIDTHS[name])
        for blocks, warps in [(BACKWARDS, FORWARDS), (FORWARDS, BACKWARDS), (BACKWARDS, SHUFFLED)]:
            again = machine.solve(p, SMALL, passes=(name,), blocks=blocks, warps=warps, seed=1)
            assert torch.equal(first, getattr(again, WIDTHS[name]))


def cancelling(dtype: torch.dtype) -> tuple[Problem, Tensor]:
    """Integers whose partial sums no 16-bit number holds, and y, which one does."""
    p = make_problem(4, 8, 1600, dtype=dtype, bias=False, shift=False)
    p.scale_out.zero_()
    p.x.fill_(1)
    # 8 bits hold each, and none of the sums of many of one sign
    values = torch.randint(129, 256, (8, 800), generator=torch.Generator().manual_seed(0))
    p.weight[:, :800], p.weight[:, 800:] = values, -values.flip(1)
    p.weight[:, 5] -= torch.arange(8)
    return p, p.x.double() @ p.weight.double().mT


@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
def test_sums_are_rounded_once(machine, dtype):
    p, y = cancelling(dtype)
    assert (y == -torch.arange(8.0)).all()
    for multiprocessors in (SMALL, FEW, LARGE):
        assert torch.equal(machine.solve(p, multiprocessors, passes=("forward",)).y.double(), y)
