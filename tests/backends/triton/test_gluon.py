"""The Gluon kernels for Hopper on a model of the machine: results, tiles, schedules and edges."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.triton.gluon_machine import Schedule
from tests.backends.triton.gluon_package import Change, load, scheduled
from tests.cuda_host.test_kernels import SPARED, assert_as_infinite, with_infinity
from tests.oracle import Answer, Problem, check, make_problem, strided

# the launcher adds partial sums with a plain kernel, which is interpreted
pytestmark = pytest.mark.usefixtures("interpreted")

HALF, BF16 = torch.float16, torch.bfloat16
NAMES = ("y", "dx", "du", "dv", "df")
PASSES = ("forward", "grad_input", "grad_scales")

SCHEDULES = [
    Schedule("first"),
    Schedule("last"),
    Schedule("turns", backwards=True),
    Schedule("random", 1),
    Schedule("random", 2, backwards=True),
]

#: Tokens of a tile in two parts; stages; programs; tokens that a program of grad_scales sums over.
Tile = tuple[int, int, int, int, int]
NARROW, PAIRED, WIDE = (128, 0, 2, 2, 64), (128, 64, 3, 2, 384), (256, 0, 4, 1, 1024)


class PlainKernels(Exception):
    """The launcher called the plain kernels."""


def _raise(*_: object) -> None:
    raise PlainKernels


class Gluon:
    """The backend on the machine, with the ``changes`` made to its modules."""

    def __init__(self, changes: dict[str, Change] | None = None) -> None:
        self.module = load("rlrr_kernels.backends.triton.gluon", "launch", changes)
        self.module.plain = SimpleNamespace(**{**vars(self.module.plain), **dict.fromkeys(PASSES, _raise)})

    def run(
        self, name: str, p: Problem, tile: Tile = PAIRED, schedule: Schedule = SCHEDULES[0], need_shift: bool = True
    ) -> tuple[Tensor, ...]:
        """Return the results of one pass."""
        wide, extra, stages, programs, tokens = tile
        self.module.multiprocessors = lambda _: programs
        self.module.GRAM_STAGES = stages
        scales = p.weight, p.scale_out, p.scale_in
        chosen: dict[str, Any] = {"choice": self.module.Width(wide, extra, stages)}
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        try:
            with scheduled(schedule):
                if name == "forward":
                    return (self.module.forward(p.x, *scales, p.bias, p.shift, **chosen),)
                if name == "grad_input":
                    return (self.module.grad_input(p.dy, *scales, **chosen),)
                return self.module.grad_scales(p.dy, p.x, *scales, need_shift, tokens=tokens)
        finally:
            torch.use_deterministic_algorithms(deterministic)

    def solve(self, p: Problem, tile: Tile = PAIRED, schedule: Schedule = SCHEDULES[0]) -> Answer:
        return Answer(*(result for name in PASSES for result in self.run(name, p, tile, schedule)))


@pytest.fixture(scope="module")
def gluon() -> Gluon:
    return Gluon()


SHAPES = [  # M, N, K, groups
    (1, 8, 8, 1),  # one of everything, nearly all of it padding
    (257, 136, 72, 1),  # every index a little beyond a tile, one step's depth
    (70, 200, 584, 1),  # the ring turns more than twice
    (520, 264, 328, 1),  # several tiles a program
    (300, 384, 192, 3),  # groups of one tile each, of two steps in grad_input
    (2000, 8, 64, 1),  # many waves of one step
    (128, 128, 64, 1),  # whole tiles and nothing else
]


@pytest.mark.parametrize(
    ("tile", "dtype"),
    [
        pytest.param(NARROW, BF16, id="128-bfloat16"),
        pytest.param(PAIRED, HALF, id="192-float16"),
        pytest.param(WIDE, BF16, id="256-bfloat16"),
        pytest.param(NARROW, HALF, id="128-float16", marks=pytest.mark.slow),
        pytest.param(PAIRED, BF16, id="192-bfloat16", marks=pytest.mark.slow),
        pytest.param(WIDE, HALF, id="256-float16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_shapes(gluon, m, n, k, groups, tile, dtype):
    check(p := make_problem(m, n, k, groups, dtype), gluon.solve(p, tile, SCHEDULES[m % len(SCHEDULES)]))


@pytest.mark.parametrize("tile", [pytest.param(PAIRED, id="192"), pytest.param(WIDE, id="256", marks=pytest.mark.slow)])
def test_no_schedule_changes_a_bit(gluon, tile):
    p = make_problem(500, 256, 392, 2, BF16)
    answers = [gluon.solve(p, tile, schedule) for schedule in [*SCHEDULES, SCHEDULES[0]]]
    check(p, answers[0])
    for answer, name in itertools.product(answers[1:], NAMES):
        assert torch.equal(getattr(answer, name), getattr(answers[0], name)), name


def test_no_width_of_tiles_changes_a_bit_of_the_products(gluon):
    """Each element is the same chain of products, whatever the tile and the number of programs."""
    p = make_problem(400, 264, 200, dtype=BF16)
    for name in ("forward", "grad_input"):
        first, *others = (gluon.run(name, p, tile)[0] for tile in (NARROW, PAIRED, WIDE))
        for other in others:
            assert torch.equal(other, first), name


@pytest.mark.parametrize(("bias", "shift"), [(False, False), (True, False), (False, True)])
def test_bias_and_shift_each_absent(gluon, bias, shift):
    p = make_problem(140, 136, 72, dtype=BF16, bias=bias, shift=shift)
    check(p, gluon.solve(p))


def test_df_is_written_only_with_need_shift(gluon):
    p = make_problem(140, 136, 72, dtype=BF16)
    with_df, without = (gluon.run("grad_scales", p, need_shift=shift) for shift in (True, False))
    assert torch.equal(with_df[0], without[0])
    assert torch.equal(with_df[1], without[1])
    assert without[2].shape == (0,)


def test_slices_of_rows_are_processed_one_after_another(gluon, monkeypatch):
    """If the partial sums of only one tile of 128 rows fit."""
    p = make_problem(140, 512, 72, 2, BF16)
    whole = gluon.run("grad_scales", p)
    monkeypatch.setattr(gluon.module, "WORKSPACE_BYTES", 1)
    shapes, real = [], gluon.module.plain.partial_sums
    monkeypatch.setattr(gluon.module.plain, "partial_sums", lambda n, *a: (shapes.append(n), real(n, *a))[1])
    sliced = gluon.run("grad_scales", p)
    assert shapes == [128] * 4
    assert torch.equal(sliced[0], whole[0])
    assert torch.allclose(sliced[1], whole[1], rtol=1e-5, atol=1e-4)
    assert torch.equal(sliced[2], whole[2])


@pytest.mark.parametrize(("passed", "name"), [("forward", "scale_in"), ("grad_input", "scale_out")])
def test_vectors_at_addresses_where_no_box_can_begin(gluon, passed, name):
    """As views of a flat parameter are."""
    p = make_problem(140, 136, 72, dtype=BF16)
    expected = gluon.run(passed, p)[0]
    vector = getattr(p, name)
    flat = torch.cat([torch.zeros(1), vector.flatten()])
    setattr(p, name, flat[1:].view(vector.shape))
    assert torch.equal(gluon.run(passed, p)[0], expected)


def test_matrices_with_gaps_between_rows_are_loaded_in_boxes(gluon):
    """The gaps hold NaN."""
    p = make_problem(140, 136, 72, dtype=BF16)
    p.x, p.dy = strided(p.x, "rows apart"), strided(p.dy, "rows apart")
    check(p, gluon.solve(p))


@pytest.mark.parametrize(
    ("passed", "shape", "how"),
    [
        ("forward", (140, 136, 67, 1), "rows apart"),  # of x and W, though v has but one
        ("grad_input", (140, 131, 72, 1), "rows apart"),
        *itertools.product(PASSES, [(140, 136, 72, 1)], ["transposed", "off by one element"]),
        *((name, (140, 136, 72, 2), None) for name in PASSES),  # groups of a tile and a bit
    ],
)
def test_the_plain_kernels_serve_what_boxes_cannot_load(gluon, passed, shape, how):
    p = make_problem(*shape, dtype=BF16)
    if how is not None:
        p.x, p.dy, p.weight = (strided(t, how) for t in (p.x, p.dy, p.weight))
    with pytest.raises(PlainKernels):
        gluon.run(passed, p)


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_power_of_two_scales_equal_a_prescaled_weight_bit_for_bit(gluon, sign, dtype):
    """1 + uv = 2 or 4 (or -2, -1/2) rounds nothing, so rescaling must change no bit of the product."""
    p, plain = (make_problem(150, 256, 136, 2, dtype, bias=False, shift=False) for _ in range(2))
    pick = torch.arange(256)[:, None] % 2
    p.scale_out = 1.0 + 2.0 * pick if sign > 0 else 1.0 - 0.5 * pick
    p.scale_in = torch.full_like(p.scale_in, 1.0 if sign > 0 else -3.0)
    plain.weight = (plain.weight * (1 + p.scale_out * p.scale_in[0])).to(dtype)
    plain.scale_out = torch.zeros_like(plain.scale_out)
    for name in ("forward", "grad_input"):
        assert torch.equal(*(gluon.run(name, each)[0] for each in (p, plain))), name


@pytest.mark.parametrize("name", ["x", "dy", "weight", "scale_out", "scale_in"])
def test_padding_makes_no_nan_of_an_infinity(gluon, name):
    """Tokens, depth, rows and columns all end inside a tile, where 0 times infinity would be NaN."""
    for place in (0, -1):
        p = with_infinity(make_problem(70, 200, 72, 1, BF16), name, place)
        got = gluon.solve(p)
        assert_as_infinite(p, got, SPARED.get(name, NAMES), f"{name} at {place}")
