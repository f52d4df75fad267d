"""grad_scales on a W whose partial sums would outgrow their workspace: the same results, slice by slice.

The limit is lowered in a copy of the source, so that small layers are worked through in slices.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cuda_host.faults import Fault
from tests.cuda_host.machine import (
    BACKWARDS,
    FORWARDS,
    LARGE,
    SHUFFLED,
    SMALL,
    HopperMachine,
    Machine,
    MachineError,
    build,
    build_hopper,
)
from tests.oracle import Answer, Problem, assert_close, differentiate, make_problem

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
LIMIT = 6 * 2**10
#: What is planted here is no fault.
LOWERED = Fault("a small workspace", "grad_scales", "partials.cuh", "1'900'000", "6 << 10")

BUILDS: dict[str, Callable[[Path], Machine]] = {
    "general": lambda sources: Machine(build(sources, ("grad_scales",), "-O1")),
    "hopper": lambda sources: HopperMachine(build_hopper(sources, ("grad_scales",))),
}


@pytest.fixture(scope="module", params=BUILDS)
def sliced(request, tmp_path_factory, machine) -> Machine:
    """A machine whose grad_scales has 6 KiB for partial sums."""
    return BUILDS[request.param](LOWERED.plant(tmp_path_factory.mktemp(request.param) / "cuda"))


SHAPES = [
    (40, 304, 520, 1),  # slices of rows, the last of them smaller
    (70, 72, 2056, 1),  # slices of columns as well
    (33, 304, 1288, 1),
    (40, 96, 200, 12),  # slices of several groups
    (40, 576, 136, 3),  # groups that fall into slices
]


def disagreement(machine: Machine, p: Problem, multiprocessors: int, **how: object) -> str | None:
    """Hold du, dv and df to the yardstick."""
    exact, plain = differentiate(p, torch.float64), differentiate(p, SINGLE)
    try:
        got = machine.solve(p, multiprocessors, passes=("grad_scales",), **how)
        for name in ("du", "dv", "df"):
            assert_close(name, getattr(got, name), getattr(plain, name), getattr(exact, name))
    except (AssertionError, MachineError) as reason:
        return str(reason)
    return None


def floats(machine: Machine, p: Problem, multiprocessors: int) -> int:
    (m, k), n = p.x.shape, p.weight.shape[0]
    return machine.workspace_floats("grad_scales", m, n, k, len(p.scale_in), p.x.dtype, multiprocessors=multiprocessors)


@pytest.mark.parametrize("multiprocessors", [SMALL, LARGE])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices(sliced, shape, multiprocessors):
    p = make_problem(*shape, BF16)
    assert 4 * floats(sliced, p, multiprocessors) <= LIMIT
    assert disagreement(sliced, p, multiprocessors) is None


@pytest.mark.parametrize(("dtype", "weight_dtype"), [(SINGLE, SINGLE), (HALF, SINGLE), (SINGLE, BF16)], ids=str)
@pytest.mark.parametrize("shape", [(33, 135, 521, 1), (40, 90, 203, 3)], ids=str)
def test_slices_of_other_dtypes_and_odd_sizes(sliced, shape, dtype, weight_dtype):
    if isinstance(sliced, HopperMachine):
        pytest.skip("left to the other kernels")
    for multiprocessors in (SMALL, LARGE):
        assert disagreement(sliced, make_problem(*shape, dtype, weight_dtype), multiprocessors) is None


def same(a: Answer, b: Answer) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("du", "dv", "df"))


def test_no_order_of_blocks_or_warps_changes_a_bit(sliced):
    p = make_problem(*SHAPES[2], BF16)
    first = sliced.solve(p, SMALL, passes=("grad_scales",))
    for blocks, warps in [(BACKWARDS, FORWARDS), (FORWARDS, BACKWARDS), (BACKWARDS, SHUFFLED)]:
        assert same(first, sliced.solve(p, SMALL, passes=("grad_scales",), blocks=blocks, warps=warps, seed=1))


def test_df_is_skipped_unless_asked_for(sliced):
    p = make_problem(*SHAPES[2], BF16)
    with_df = sliced.solve(p, SMALL, passes=("grad_scales",))
    without = sliced.solve(p, SMALL, passes=("grad_scales",), need_shift=False)
    assert without.df.numel() == 0
    assert torch.equal(with_df.du, without.du)
    assert torch.equal(with_df.dv, without.dv)


@pytest.mark.parametrize("kind", BUILDS)
def test_the_workspace_stays_below_two_megabytes(kind, request):
    """For any layer; and it is used where there is a use for it."""
    machine = request.getfixturevalue("machine" if kind == "general" else "hopper")
    most = 0
    sides = (1, 8, 100, 768, 4096, 16384, 2**20, 2**30)
    for n, k, groups in itertools.product(sides, sides, (1, 4)):
        for m, dtype in itertools.product((1, 197, 50432), (SINGLE, BF16)):
            for multiprocessors in (1, 132):
                if n % groups == 0:
                    asked = 4 * machine.workspace_floats("grad_scales", m, n, k, groups, dtype, multiprocessors)
                    assert 0 < asked <= 1_900_000, (m, n, k, groups)
                    most = max(most, asked)
    assert most > 1_800_000
    assert 4 * machine.workspace_floats("grad_scales", 197, 2**20, 768, 2**20) <= 1_900_000


FAULTS = [
    ("general", "grad_scales.cu", "p.first_tile + n_tile % p.group_tiles) *", "n_tile % p.group_tiles) *"),
    ("general", "grad_scales.cu", "group = p.first_group + n_tile", "group = n_tile"),
    ("general", "grad_scales.cu", "k_start = p.first_col + column", "k_start = column"),
    ("general", "grad_scales.cu", "- p.first_tile * Tile::kRows;", ";"),
    ("general", "grad_scales.cu", "* kTokenShares + share) * p.rows + in_slice", "* kTokenShares + share) * p.rows"),
    ("general", "partials.cuh", "s.tiles = Slice::least(step_.tiles, all_.tiles - s.tile)", "s.tiles = step_.tiles"),
    ("hopper", "hopper/persistent_gram.cuh", "(p.first_tile + item.row_tile", "(item.row_tile"),
    ("hopper", "hopper/persistent_gram.cuh", "item.group = p.first_group + item", "item.group = item"),
    ("hopper", "hopper/persistent_gram.cuh", "item.col = p.first_col + item", "item.col = item"),
    ("hopper", "hopper/persistent_gram.cuh", "row * p.cols + item.col_in_slice", "row * p.cols + item.col"),
    *itertools.chain.from_iterable(
        [("general", *fault), ("hopper", *fault)]
        for fault in (
            ("partials.cuh", "s.col_tile > 0;", "false;"),
            ("partials.cuh", "s.tile > 0;", "false;"),
            ("partials.cuh", "s.tile > 0;", "true;"),
            ("partials.cuh", "g.dv + s.group * g.layer.k +", "g.dv +"),
            ("partials.cuh", "group * group_rows + tile * tile_rows;", "group * group_rows;"),
            (
                "partials.cuh",
                "s.tile < all_.tiles; s.tile += step_.tiles",
                "s.tile < step_.tiles; s.tile += step_.tiles",
            ),
        )
    ),
]


@pytest.mark.parametrize(
    ("kind", "file", "old", "new"),
    [FAULTS[0], *(pytest.param(*fault, marks=pytest.mark.slow) for fault in FAULTS[1:])],
)
def test_every_fault_is_noticed(machine, tmp_path, kind, file, old, new):
    sources = LOWERED.plant(tmp_path / "lowered")
    text = (sources / file).read_text()
    assert text.count(old) == 1
    (sources / file).write_text(text.replace(old, new))
    faulty = BUILDS[kind](sources)
    problems = [make_problem(*shape, BF16) for shape in SHAPES]
    assert any(disagreement(faulty, p, SMALL) for p in problems)
