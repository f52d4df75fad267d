"""The Gluon kernels for Hopper on a model of the machine: the suite of all backends, tiles, schedules, every edge."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.backends.triton.gluon_language import scheduled
from tests.backends.triton.gluon_machine import Schedule
from tests.backends.triton.gluon_package import Change, load
from tests.cuda_host.test_kernels import SPARED, assert_as_infinite, with_infinity
from tests.oracle import Answer, Problem, check, make_problem

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

_HALVES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_ROW = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@dataclass(frozen=True)
class Tile:
    """``wide + extra`` tokens, of which the extra are 0 or 64; programs; shares of the tokens in grad_scales."""

    wide: int = 128
    extra: int = 64
    stages: int = 3
    programs: int = 3
    splits: int = 3


def _boxes(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(t, t.shape, t.stride(), [rows, cols], _ROW if t.dtype is torch.float32 else _HALVES)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _unwritten(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


class Gluon:
    """The kernels over the machine, with texts of the modules of ``changes`` changed."""

    def __init__(self, changes: dict[str, Change] | None = None) -> None:
        self.product, self.gram = (self._load(name, changes or {}) for name in ("product", "gram"))

    @staticmethod
    def _load(name: str, changes: dict[str, Change]) -> ModuleType:
        own = {module: change for module, change in changes.items() if module == name}
        return load("rlrr_kernels.backends.triton.gluon", name, own)

    def _multiply(
        self,
        forward: bool,
        act: Tensor,
        p: Problem,
        width: int,
        depth_scales: Tensor,
        row_scales: Tensor,
        group_tiles: int,
        group_steps: int,
        tile: Tile,
    ) -> Tensor:
        out = _unwritten(len(act), width, dtype=act.dtype)
        extra = tile.extra or 64
        self.product.product_kernel[(tile.programs,)](
            _boxes(act, tile.wide, 64),
            _boxes(act, extra, 64),
            _boxes(p.weight, *((128, 64) if forward else (64, 128))),
            _boxes(depth_scales, 1, 64),
            _boxes(out, tile.wide, 64),
            _boxes(out, extra, 64),
            row_scales,
            row_scales if p.bias is None else p.bias,
            row_scales if p.shift is None else p.shift,
            len(act),
            width,
            _ceil_div(act.shape[1], 64),
            group_tiles,
            group_steps,
            forward,
            forward or len(p.scale_in) == 1,
            forward and p.bias is not None,
            forward and p.shift is not None,
            p.weight.dtype is BF16,
            tile.wide,
            tile.extra,
            64,
            tile.stages,
        )
        return out

    def forward(self, p: Problem, tile: Tile) -> Tensor:
        n = len(p.weight)
        tiles = _ceil_div(n // len(p.scale_in), 128)
        return self._multiply(True, p.x, p, n, p.scale_in.squeeze(1), p.scale_out.squeeze(1), tiles, 0, tile)

    def grad_input(self, p: Problem, tile: Tile) -> Tensor:
        n, k = p.weight.shape
        steps = _ceil_div(n // len(p.scale_in), 64)
        return self._multiply(False, p.dy, p, k, p.scale_out.view(1, -1), p.scale_in.squeeze(1), 0, steps, tile)

    def grad_scales(self, p: Problem, tile: Tile, need_shift: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        (m, n), k, groups = p.dy.shape, p.x.shape[1], len(p.scale_in)
        k_tiles, group_tiles = _ceil_div(k, 256), _ceil_div(n // groups, 128)
        split_tokens = 64 * _ceil_div(_ceil_div(m, 64), tile.splits)
        splits = _ceil_div(m, split_tokens)
        du, df = _unwritten(splits * k_tiles, n), _unwritten(splits * k_tiles, n)
        dv = _unwritten(groups, splits * 2 * group_tiles, k)
        self.gram.gram_kernel[(splits * k_tiles * groups * group_tiles,)](
            _boxes(p.dy, 64, 128),
            _boxes(p.x, 64, 256),
            p.weight,
            p.scale_out.squeeze(1),
            p.scale_in.squeeze(1),
            du,
            dv,
            df,
            m,
            n,
            k,
            n // groups,
            split_tokens,
            splits,
            need_shift,
            tile.stages,
        )
        return du.sum(0)[:, None], dv.sum(1, keepdim=True), df.sum(0)

    def run(self, name: str, p: Problem, tile: Tile, schedule: Schedule) -> tuple[Tensor, ...]:
        """What one pass gives."""
        with scheduled(schedule):
            results = getattr(self, name)(p, tile)
        return results if isinstance(results, tuple) else (results,)

    def solve(self, p: Problem, tile: Tile, schedule: Schedule) -> Answer:
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


@pytest.mark.parametrize("dtype", [BF16, HALF], ids=str)
@pytest.mark.parametrize("tile", [Tile(128, 0, 2), Tile(128, 64, 3), Tile(256, 0, 4, 2, 1)], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_shapes(gluon, m, n, k, groups, tile, dtype):
    check(p := make_problem(m, n, k, groups, dtype), gluon.solve(p, tile, SCHEDULES[m % len(SCHEDULES)]))


@pytest.mark.parametrize("tile", [Tile(128, 64, 2), Tile(256, 0, 3)], ids=str)
def test_no_schedule_changes_a_bit(gluon, tile):
    p = make_problem(500, 256, 392, 2, BF16)
    answers = [gluon.solve(p, tile, schedule) for schedule in [*SCHEDULES, SCHEDULES[0]]]
    check(p, answers[0])
    for answer, name in itertools.product(answers[1:], NAMES):
        assert torch.equal(getattr(answer, name), getattr(answers[0], name)), name


def test_no_width_of_tiles_changes_a_bit_of_the_products(gluon):
    """Each element is one chain of the same products, whatever the tile and the number of programs."""
    p = make_problem(400, 264, 200, dtype=BF16)
    tiles = [Tile(128, 0), Tile(128, 64, 4, 7), Tile(256, 0, 2, 1)]
    results = [(gluon.forward(p, tile), gluon.grad_input(p, tile)) for tile in tiles]
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


@pytest.mark.parametrize(("bias", "shift"), [(False, False), (True, False), (False, True)])
def test_bias_and_shift_each_absent(gluon, bias, shift):
    p = make_problem(140, 136, 72, dtype=BF16, bias=bias, shift=shift)
    check(p, gluon.solve(p, Tile(), SCHEDULES[0]))


def test_df_is_written_only_if_asked_for(gluon):
    p = make_problem(140, 136, 72, dtype=BF16)
    with_df, without = (gluon.grad_scales(p, Tile(), need_shift) for need_shift in (True, False))
    assert torch.equal(with_df[0], without[0])
    assert torch.equal(with_df[1], without[1])
    assert without[2].isnan().all()


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
    assert torch.equal(gluon.forward(p, Tile()), gluon.forward(plain, Tile()))
    assert torch.equal(gluon.grad_input(p, Tile()), gluon.grad_input(plain, Tile()))


@pytest.mark.parametrize("name", ["x", "dy", "weight", "scale_out", "scale_in"])
def test_beyond_every_edge_an_infinity_finds_no_zero(gluon, name):
    """Tokens, depth, rows and columns all end inside a tile: padding must not make NaN of it."""
    for place in (0, -1):
        p = with_infinity(make_problem(70, 200, 72, 1, BF16), name, place)
        got = gluon.solve(p, Tile(), SCHEDULES[0])
        assert_as_infinite(p, got, SPARED.get(name, NAMES), f"{name} at {place}")
