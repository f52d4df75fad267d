"""The candidates and their tensors."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels.backends import choice
from rlrr_kernels.tune.candidates import Candidate, candidates, copies_of, make_tensors, run, traffic
from tests.oracle import require
from tests.tune.conftest import TILES
from tests.tune.entries import CPU, PROBLEM


def names(found):
    return list(dict.fromkeys(one.backend for one in found))


@pytest.mark.usefixtures("tiled")
def test_the_backend_that_serves_unasked_comes_first_and_each_brings_its_tiles():
    require("cpu")
    found = candidates(PROBLEM, CPU, 24)
    assert found[0] == Candidate("cpu")
    assert found[-3:] == [Candidate("tiled", tile) for tile in TILES]
    assert "reference" in names(found)
    assert candidates(PROBLEM, CPU, 1)[-2:] == found[-3:-1]
    assert candidates(PROBLEM, CPU, 24, ["tiled"]) == found[-3:]
    assert "cpu" not in names(candidates(PROBLEM._replace(dtype=torch.float16), CPU, 24))


def test_what_failed_its_check_or_is_not_here_does_not_compete(monkeypatch):
    monkeypatch.setattr(choice, "failed", lambda name, device: "dx: error 1" if name == "cpu" else None)
    found = candidates(PROBLEM, CPU, 24)
    assert "cpu" not in names(found)
    assert "reference" in names(found)
    with pytest.raises(ValueError, match=r"forward M=1000 N=768 K=3072: no backend serves torch\.float32 here"):
        candidates(PROBLEM, CPU, 24, ["cpu"])


def test_a_choice_in_words():
    assert [str(Candidate("triton", tile)) for tile in TILES] == [
        "triton m64, 4 warps",
        "triton m128, 8 warps",
        "triton m32, 4 warps, 2 splits",
    ]
    assert str(Candidate("cuda")) == "cuda"


def test_sets_of_tensors_outgrow_the_second_cache():
    small = PROBLEM._replace(m=197, n=768, k=768, dtype=torch.bfloat16)
    assert traffic(small) == 2 * 197 * 768 * 2 + 4 * 768 * 768
    copies = copies_of(small, 50 * 2**20)
    assert copies * traffic(small) >= 2 * 50 * 2**20
    assert (copies - 1) * traffic(small) < 2 * 50 * 2**20
    assert [copies_of(small, size) for size in (0, 2**40)] == [2, 64]


def test_sets_of_tensors_differ_and_hold_what_the_pass_reads():
    small = PROBLEM._replace(kernel="grad_input", m=5, n=6, k=7, groups=3, dtype=torch.bfloat16)
    first, second = make_tensors(small, 2, CPU)
    assert (first.dy.shape, first.weight.shape, first.x.shape) == ((5, 6), (6, 7), (0, 7))
    assert (first.dy.dtype, first.weight.dtype, first.bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert not torch.equal(first.dy, second.dy)
    assert not torch.equal(first.weight, second.weight)
    assert (first.scale_in.shape, first.scale_in.dtype) == ((3, 1, 7), torch.float32)


@pytest.mark.parametrize("kernel", ["forward", "grad_input", "grad_scales"])
@pytest.mark.parametrize("tile", [None, TILES[1]])
def test_a_launch_is_the_pass_with_the_choice(tiled, kernel, tile):
    small = PROBLEM._replace(kernel=kernel, m=5, n=6, k=7, groups=3, dtype=torch.float64, weight_dtype=torch.float64)
    (tensors,) = make_tensors(small, 1, CPU)
    results = run(small, tensors, Candidate("tiled", tile))
    assert tiled.ran == [(kernel, tile)]
    shapes = {"forward": [(5, 6)], "grad_input": [(5, 7)], "grad_scales": [(6, 1), (3, 1, 7), (6,)]}
    assert [tuple(result.shape) for result in results] == shapes[kernel]
    assert all(result.dtype is torch.float64 and result.isfinite().all() for result in results)
