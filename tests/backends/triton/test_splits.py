"""Split sums: over the depth in forward and grad_input, and over slices of rows in grad_scales."""

import dataclasses

import pytest
import torch

from rlrr_kernels.backends.triton import choose, launch
from rlrr_kernels.backends.triton.choose import row_slices, shares
from tests.backends.triton.test_numerics import BF16, SINGLE, SMALL, solve
from tests.oracle import check, make_problem

#: Sums are split in the same way for every dtype, and float32 is interpreted the fastest.
DTYPES = [SINGLE, pytest.param(BF16, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    ("splits", "steps", "expected"),
    [(1, 12, (1, 12)), (3, 12, (3, 4)), (4, 5, (3, 2)), (8, 3, (3, 1)), (5, 12, (4, 3)), (7, 48, (7, 7))],
)
def test_no_split_is_empty(splits, steps, expected):
    assert shares(steps, splits) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups", "splits"),
    [
        (33, 45, 100, 1, 3),  # 4 steps of K, 3 of N: two splits of each
        (33, 30, 72, 3, 2),  # grad_input: 3 groups of one cut step, shared by two splits
        (17, 90, 72, 3, 4),  # 6 steps: a split starts in the middle of a group
        (33, 96, 64, 2, 2),  # whole steps
        (1, 16, 8, 1, 5),  # one step: nothing to split
    ],
)
def test_split_over_the_depth(triton_device, monkeypatch, m, n, k, groups, splits, dtype):
    partials = []
    add = launch._sum_splits
    monkeypatch.setattr(launch, "_sum_splits", lambda *a: (partials.append(tuple(a[0].shape)), add(*a)))
    choice = dataclasses.replace(SMALL, splits=splits)
    p = make_problem(m, n, k, groups, dtype, device=triton_device)
    check(p, solve(p, choice))
    cut = shares(-(-k // 32), splits)[0], shares(groups * -(-(n // groups) // 16), splits)[0]
    assert partials == [(count, m, width) for count, width in zip(cut, (n, k), strict=True) if count > 1]


@pytest.mark.parametrize(("bias", "shift"), [(False, False), (True, False), (False, True)])
def test_bias_and_shift_are_added_once(triton_device, bias, shift):
    p = make_problem(40, 20, 96, bias=bias, shift=shift, device=triton_device)
    check(p, solve(p, dataclasses.replace(SMALL, splits=3)))


def test_a_split_sum_is_the_same_every_time(triton_device):
    p = make_problem(33, 32, 100, device=triton_device)
    choice = dataclasses.replace(SMALL, splits=2)
    one, two = (solve(p, choice) for _ in range(2))
    for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(two), strict=True):
        assert torch.equal(a, b)


#: Rows and columns of G in a tile.
TILE = 128, 256


def test_slices_cover_every_row_once_within_the_limit():
    n = k = 16384
    slices = row_slices(n, k, 1, *TILE, 1, 2**21)
    assert slices[0] == (0, 0, 2688)  # 21 rows of tiles of 4 * (128 * 65 + 16384) = 98,816 bytes fit in 2 MiB
    assert [first for _, first, _ in slices[1:]] == [end for _, _, end in slices[:-1]]
    assert slices[-1][2] == n


def test_slices_never_cross_a_group():
    slices = row_slices(3 * 200, 4096, 3, 64, 64, 1, 70_000)
    # a row of tiles takes 4 * (64 * 65 + 4096) = 33,024 bytes: two fit
    assert slices == tuple(
        (g, 200 * g + first, 200 * g + end) for g in range(3) for first, end in ((0, 128), (128, 200))
    )


def test_vit_layers_take_one_slice():
    for n, k, groups in ((2304, 768, 3), (4096, 1024, 1), (1280, 5120, 1)):
        assert row_slices(n, k, groups, *TILE, 1, choose.WORKSPACE_BYTES) == ((0, 0, n),)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), [(70, 100, 40, 1), (70, 90, 40, 3)])
def test_grad_scales_in_slices(triton_device, monkeypatch, m, n, k, groups, dtype):
    monkeypatch.setattr(choose, "WORKSPACE_BYTES", 2 * 2 * 4 * (16 * 3 + k))  # two rows of tiles, two splits
    launches = []
    kernel = launch.grad_scales_kernel

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(launch, "grad_scales_kernel", Counting())
    p = make_problem(m, n, k, groups, dtype, device=triton_device)
    check(p, solve(p, SMALL))
    assert len(launches) == groups * -(-(n // groups) // 32)
