"""The choice of tiles by table and cost model, for several GPUs."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlrr_kernels.backends import tuned
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.triton import choose, launch
from rlrr_kernels.backends.triton.choose import WORKSPACE_BYTES, Choice, Device, candidates, refusal
from tests.backends.triton.test_numerics import SMALL
from tests.oracle import make_problem

H100 = Device((9, 0), 132, 232_448)
DEVICES = [
    H100,
    Device((8, 0), 108, 166_912),
    Device((8, 9), 142, 101_376),
    Device((10, 0), 148, 232_448),
    Device((12, 0), 170, 101_376),
]
LAYERS = [(2304, 768, 3), (768, 768, 1), (3072, 768, 1), (768, 3072, 1), (3840, 1280, 3), (5120, 1280, 1)]
PASSES = ("forward", "grad_input", "grad_scales")
BF16, SINGLE = torch.bfloat16, torch.float32


def problem(kernel, m, n=768, k=768, groups=1, dtype=BF16, tf32=False, rank=1):
    return Problem(kernel, m, n, k, groups, dtype, dtype, tf32, rank)


def programs(asked, choice):
    return choose.programs(asked, choice) * choice.splits


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: f"sm_{d.capability}")
def test_the_choice_is_in_the_table_and_the_first_of_few_candidates(device):
    for kernel, m, (n, k, groups), tf32 in itertools.product(PASSES, (1, 197, 12_608), LAYERS, (None, False, True)):
        asked = problem(kernel, m, n, k, groups, BF16 if tf32 is None else SINGLE, bool(tf32))
        for aligned in (True, False):
            found = candidates(asked, device, aligned)
            assert choose.choose(asked, device, aligned) == found[0]
            assert len(set(found)) == len(found) <= 15
            tiles = choose.tiles(asked, device, aligned)
            assert len(tiles) in (2, 3) or tiles == choose.HOPPER_TF32_SCALES[1:]
            assert {replace(each, splits=1) for each in found} == set(tiles)
            assert [refusal(asked, each, device) for each in found] == [None] * len(found)


def test_many_tokens_get_a_large_tile_and_whole_sums():
    for device in DEVICES:
        for kernel in PASSES[:2]:
            chosen = choose.choose(problem(kernel, 50_432, 4096, 1024), device)
            assert chosen.block_m * (chosen.block_n if kernel == "forward" else chosen.block_k) >= 128 * 64
            assert chosen.splits == 1


@pytest.mark.parametrize("kernel", PASSES)
def test_few_tokens_occupy_the_gpu(kernel):
    """With one image, tiles of 256 x 128 for a 768 x 768 layer would occupy 6 of 132 multiprocessors."""
    for device in DEVICES:
        asked = problem(kernel, 197)
        assert programs(asked, choose.choose(asked, device)) >= device.multiprocessors // 3


def test_a_deep_sum_of_few_tiles_is_split():
    """A 768 x 3072 layer with one image has 84 tiles of 32 x 64, with 48 steps of 64 each."""
    for kernel, n, k in (("forward", 768, 3072), ("grad_input", 3072, 768)):
        assert choose.choose(problem(kernel, 197, n, k), H100).splits > 1
    assert choose.choose(problem("grad_scales", 12_608), H100).splits > 1, "36 tiles of 128 x 128, of 197 steps"


@pytest.mark.parametrize("kernel", PASSES)
def test_no_share_is_empty_and_all_fit_in_the_workspace(kernel):
    seen = set()
    # the last has more tiles than multiprocessors whatever m is
    for m, (n, k, groups), device in itertools.product((1, 197, 12_608), [*LAYERS, (16_384, 16_384, 1)], DEVICES):
        asked = problem(kernel, m, n, k, groups)
        for choice in candidates(asked, device):
            seen.add(choice.splits)
            steps = choose.steps(asked, choice)
            assert choice.splits == choose.shares(steps, choice.splits)[0] <= steps
            if choice.splits > 1:
                assert choice.splits * choose.partial_bytes(asked, choice) <= WORKSPACE_BYTES
                assert kernel == "grad_scales" or choose.programs(asked, choice) < device.multiprocessors
    assert max(seen) > 4


@pytest.mark.parametrize(("rank", "most"), [(1, WORKSPACE_BYTES), (8, WORKSPACE_BYTES), (32, 4 * WORKSPACE_BYTES)])
def test_the_workspace_of_a_rank(rank, most):
    """All shares of a slice fit, in as many slices as that takes; a slice of one row of tiles may take more."""
    for m, (n, k, groups), device in itertools.product((197, 12_608), [*LAYERS, (8192, 8192, 1)], DEVICES):
        asked = problem("grad_scales", m, n, k, groups, rank=rank)
        assert choose.most_partial_bytes(asked) == most
        for choice in candidates(asked, device):
            sizes = n, k, groups, choice.block_n, choice.block_k, choice.splits
            slices = choose.row_slices(*sizes, choose.most_partial_bytes(asked), rank)
            rows = max(end - first for _, first, end in slices)
            part = replace_sizes(asked, rows, 1 if len(slices) > 1 else groups)
            assert choice.splits * choose.partial_bytes(part, choice) <= most
            assert choice.splits == 1 or len(slices) == 1


def replace_sizes(asked, n, groups):
    return asked._replace(n=n, groups=groups)


@pytest.mark.parametrize(("dtype", "tf32", "most"), [(BF16, False, 4), (SINGLE, True, 4), (SINGLE, False, 8)])
def test_a_larger_rank_has_no_tiles_to_choose_from_but_for_grad_scales(dtype, tf32, most):
    for kernel, rank in itertools.product(PASSES, (most, most + 1)):
        found = candidates(problem(kernel, 6304, dtype=dtype, tf32=tf32, rank=rank), DEVICES[0])
        assert bool(found) == (rank == most or kernel == "grad_scales")


def test_a_rank_makes_tiles_over_more_tokens_cheaper():
    """An element of U V is formed once for all tokens of a tile."""
    few, many = (choose.choose(problem("forward", 12_608, 3072, rank=rank), DEVICES[1]) for rank in (1, 4))
    assert many.block_m >= few.block_m


@pytest.mark.parametrize("rank", [1, 3])
def test_partial_sums_take_the_bytes_that_are_counted(interpreted, monkeypatch, rank):
    """The bound of the workspace depends on it."""
    sizes, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **kw: (sizes.append((t := real(*a, **kw)).nbytes), t)[1])
    p = make_problem(70, 90, 72, 3, rank=rank)
    choice, scales = replace(SMALL, splits=2), (p.dy, *p.forward_args[:4])
    for kernel, results, call in (
        ("forward", 70 * 90 * 4, lambda: launch.forward(*p.forward_args, choice=choice)),
        ("grad_input", 70 * 72 * 4, lambda: launch.grad_input(p.dy, *p.forward_args[1:4], choice=choice)),
        (
            "grad_scales",
            4 * (90 * rank + 3 * 72 * rank + 90),
            lambda: launch.grad_scales(*scales, True, choice=choice),
        ),
    ):
        sizes.clear()
        call()
        assert sum(sizes) - results == 2 * choose.partial_bytes(
            problem(kernel, 70, 90, 72, 3, SINGLE, rank=rank), choice
        ), kernel


def test_a_gpu_with_less_shared_memory_gets_fewer_stages_or_the_smaller_tile():
    asked = problem("grad_scales", 6304)
    large, *_ = choose.tiles(asked, H100, True)
    assert choose.stage_bytes(asked, large) * large.num_stages > 99 * 1024
    for shared in (48 * 1024, 64 * 1024, 99 * 1024, 163 * 1024):
        for kernel in PASSES:
            asked = problem(kernel, 6304, dtype=SINGLE, tf32=True)
            for tile in choose.tiles(asked, replace(DEVICES[1], shared_memory=shared), True):
                assert tile.num_stages >= 2
                assert tile.num_stages * choose.stage_bytes(asked, tile) <= shared


def test_on_hopper_no_product_of_tf32s_grad_scales_is_a_wgmma():
    asked = problem("grad_scales", 6304, dtype=SINGLE, tf32=True)
    for aligned in (True, False):
        assert all(tile.block_n < 64 for tile in choose.tiles(asked, H100, aligned))
        assert all(tile.block_n >= 64 for tile in choose.tiles(asked, DEVICES[3], aligned))
    assert "registers" in refusal(asked, Choice(32, 64, 64, 4, 3), H100)
    assert refusal(asked, Choice(32, 64, 64, 4, 3), DEVICES[3]) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"block_m": 48}, "blocks"),
        ({"block_k": 8}, "blocks"),
        ({"num_warps": 3}, "warps"),
        ({"num_stages": 0}, "stages"),
        ({"block_m": 256, "block_k": 256, "num_stages": 4}, "stages"),
        ({"splits": 0}, "splits"),
        ({"splits": 1000}, "splits"),
    ],
)
def test_choices_that_cannot_be_launched_are_refused(changed, why):
    asked = problem("forward", 6304)
    good = Choice(128, 128, 64, 8, 3)
    assert refusal(asked, good, H100) is None
    assert why in refusal(asked, replace(good, **changed), H100)


def test_the_launcher_uses_what_was_measured_if_it_can_be_launched(monkeypatch):
    asked, device = problem("forward", 64), SimpleNamespace(device=torch.device("cpu"))
    rule = choose.choose(asked, launch.INTERPRETED_DEVICE)
    measured = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3, "splits": 2}
    monkeypatch.setattr(launch, "device_of", lambda _: H100)
    for backend, tile, aligned, expected in (
        ("triton", measured, True, Choice(**measured)),
        ("triton", measured, False, choose.choose(asked, H100, False)),
        ("triton", measured | {"block_m": 63}, True, rule),
        ("gluon", measured, True, rule),
        ("triton", None, True, rule),
    ):
        entry = SimpleNamespace(backend=backend, tile=tile)
        monkeypatch.setattr(tuned, "find", lambda *given, entry=entry: entry if given[0] == asked else None)
        assert launch._chosen(asked, device, aligned) == expected
    assert rule != Choice(**measured)
