"""Faults planted in the Gluon kernels' source, one at a time: the model or the yardstick must notice each."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.backends.triton.gluon_machine import MachineError, Schedule
from tests.backends.triton.test_gluon import PAIRED, Gluon
from tests.cuda_host.faults import RESULTS, parameters
from tests.oracle import Problem, assert_close, differentiate, make_problem

pytestmark = pytest.mark.usefixtures("interpreted")


@dataclass(frozen=True)
class Fault:
    """Replaces ``old``, which occurs once in a module of the kernels, by ``new``; one pass must show it."""

    name: str
    seen_in: str
    module: str
    old: str
    new: str = ""


FAULTS = [
    Fault(
        "readers wait for the wrong phase",
        "forward",
        "product",
        "mbarrier.wait(full.index(stage), phase)",
        "mbarrier.wait(full.index(stage), phase ^ 1)",
    ),
    Fault("reads before boxes land", "grad_input", "product", "    mbarrier.wait(full.index(stage), phase)\n"),
    Fault("claims the wrong phase", "grad_input", "product", "stage, phase = 0, 1", "stage, phase = 0, 0"),
    Fault("a phase that never turns", "forward", "product", "phase ^ 1 if wraps else phase", "phase"),
    Fault("fetches without a claim", "forward", "product", "            mbarrier.wait(empty.index(stage), phase)\n"),
    Fault(
        "one reader frees a stage", "forward", "product", "empty.index(stage), count=2", "empty.index(stage), count=1"
    ),
    Fault("too few bytes expected", "forward", "product", "+ 128) + 4)", "+ 128))"),
    Fault("too many bytes expected", "grad_input", "product", "+ 128) + 4)", "+ 128) + 8)"),
    Fault(
        "a stage freed under a product",
        "forward",
        "product",
        "acc, acc_extra = warpgroup_mma_wait(0,",
        "acc, acc_extra = warpgroup_mma_wait(1,",
    ),
    Fault(
        "sums read too early",
        "grad_input",
        "product",
        "total, total_extra = warpgroup_mma_wait(0,",
        "total, total_extra = warpgroup_mma_wait(1,",
    ),
    Fault(
        "sums of the tile before",
        "forward",
        "product",
        "acc = warpgroup_mma_init(gl.zeros([64, WIDE], gl.float32, ACC))",
        "acc = warpgroup_mma_init(gl.zeros([64, WIDE], gl.float32, ACC) if tile == gl.program_id(0) else total)",
    ),
    Fault("the step's own W' over and over", "forward", "product", "form(part, next_stage,", "form(part, stage,"),
    Fault(
        "the last stage kept",
        "grad_input",
        "product",
        "        mbarrier.arrive(empty.index(stage), count=1)\n        stage, phase",
        "        stage, phase",
    ),
    Fault(
        "y's memory reused under its store",
        "forward",
        "product",
        "        wait_for_stores(0)  # the last tile's, out of the same memory\n",
    ),
    Fault("ends under a store", "grad_input", "product", "    wait_for_stores(0)\n\n\n", "\n\n"),
    Fault("y not fenced", "forward", "product", "        fence_async_shared()\n        store_box", "        store_box"),
    Fault("extra tokens over the others", "forward", "product", "[m + WIDE, row]", "[m, row]"),
    Fault("one warpgroup's rows in both", "forward", "product", ".slice(part * 64, 64).load", ".slice(0, 64).load"),
    Fault("the first group's v throughout", "forward", "product", "[number // group_tiles, depth]", "[0, depth]"),
    Fault("the first group's v throughout", "grad_input", "product", "group_scales += ROWS", "group_scales += 0"),
    Fault("u of the wrong tile", "forward", "product", "(tile + gl.num_programs(0)) %", "(tile + 1) %"),
    Fault("a mask one too wide", "grad_input", "product", "mask=at < end", "mask=at <= end"),
    Fault("W' through a register that is overwritten", "forward", "product", '"=&r,=r,r"', '"=r,=r,r"'),
    Fault(
        "a stage freed under the product",
        "grad_scales",
        "gram",
        "empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0",
        "empty.index(stage), count=1",
    ),
    Fault("every split begins at token 0", "grad_scales", "gram", "first_token + step * 64", "step * 64"),
    Fault("df of every tile", "grad_scales", "gram", "mine = k_tiles", "mine = 1"),
    Fault("dv of one half over the other's", "grad_scales", "gram", "(2 * dv_row + part)", "(2 * dv_row + 0)"),
    Fault("another group's v", "grad_scales", "gram", "v += group * K", "v += 0 * group"),
    Fault("room for one warpgroup's dv", "grad_scales", "launch", "splits * 2 * group_tiles", "splits * group_tiles"),
    Fault("tiles of all groups in each", "forward", "launch", "ceil_div(row_tiles, groups)", "row_tiles"),
]

#: One fault in the order of operations and one in the arithmetic; the others are slow tests.
QUICK = ("forward: a stage freed under a product", "grad_scales: dv of one half over the other's")


def complaint(gluon: Gluon, seen_in: str) -> str | None:
    """Return what the machine or the yardstick finds wrong with one pass, or None."""
    p = make_problem(600, 384, 392, 3, torch.bfloat16)
    for schedule in (Schedule("first"), Schedule("last"), Schedule("random", 1)):
        reason = _complaint(gluon, seen_in, p, schedule)
        if reason is not None:
            return reason
    return None


def _complaint(gluon: Gluon, seen_in: str, p: Problem, schedule: Schedule) -> str | None:
    try:
        got = gluon.run(seen_in, p, PAIRED, schedule)
    except MachineError as reason:
        return str(reason)
    exact = differentiate(p, torch.float64)
    plain = differentiate(p, torch.float32 if seen_in == "grad_scales" else torch.bfloat16)
    try:
        for name, result in zip(RESULTS[seen_in], got, strict=True):
            assert_close(name, result, getattr(plain, name), getattr(exact, name))
    except AssertionError as reason:
        return str(reason)
    return None


@pytest.mark.parametrize(
    "seen_in", ["forward", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grad_input", "grad_scales"))]
)
def test_the_comparison_passes_what_is_right(seen_in):
    assert complaint(Gluon(), seen_in) is None


@pytest.mark.parametrize("fault", parameters(FAULTS, *QUICK))
def test_fault_is_noticed(fault):
    assert complaint(Gluon({fault.module: (fault.old, fault.new)}), fault.seen_in) is not None
