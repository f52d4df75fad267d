"""Faults planted in the Hopper kernels' source, one at a time: the model and the yardstick must notice each."""

from pathlib import Path

import pytest
import torch

from tests.cuda_host.faults import RESULTS, Fault, parameters
from tests.cuda_host.machine import BACKWARDS, FORWARDS, SHUFFLED, HopperMachine, MachineError, build_hopper, compiler
from tests.oracle import Problem, assert_close, differentiate, make_problem

FAULTS = [
    Fault(
        "readers wait for the wrong phase",
        "forward",
        "hopper/warpgroups.cuh",
        "full[stage], phase,",
        "full[stage], phase ^ 1,",
    ),
    Fault(
        "fetches without a claim",
        "forward",
        "hopper/warpgroups.cuh",
        '    ptx::wait(&ring.empty[stage], phase ^ 1, "empty", stage);\n',
    ),
    Fault(
        "reads before boxes land",
        "grad_scales",
        "hopper/persistent_gram.cuh",
        "      place.await(s.ring);\n      auto& boxes",
        "      auto& boxes",
    ),
    Fault(
        "a stage released under a product",
        "grad_input",
        "hopper/persistent_product.cuh",
        "part == kInFlight - 1",
        "part == 0",
    ),
    Fault(
        "registers reused under a product",
        "forward",
        "hopper/persistent_product.cuh",
        "constexpr int kInFlight = kParts - 1",
        "constexpr int kInFlight = kParts",
    ),
    Fault("sums read too early", "forward", "hopper/persistent_product.cuh", "    ptx::finish(sums);\n"),
    Fault(
        "staging read too early",
        "grad_input",
        "hopper/persistent_product.cuh",
        "    ptx::named_barrier(1 + l.consumer, kWarpgroup);\n    const int chunk",
        "    const int chunk",
    ),
    Fault(
        "warps' dv added too early",
        "grad_scales",
        "hopper/persistent_gram.cuh",
        "    ptx::named_barrier(1, kConsumers * kWarpgroup);\n    const int col",
        "    const int col",
    ),
    Fault(
        "stride between boxes", "grad_scales", "hopper/warpgroups.cuh", "(next_box >> 4) << 16", "(next_box >> 5) << 16"
    ),
    Fault(
        "depth's step in a row",
        "forward",
        "hopper/warpgroups.cuh",
        "kAlongRow = 16 * 2 >> 4",
        "kAlongRow = 16 * 4 >> 4",
    ),
    Fault("no swizzle in loads", "grad_input", "hopper/warpgroups.cuh", "((chunk ^ (row % 8)) << 4)", "(chunk << 4)"),
    Fault(
        "W's chunks in order",
        "forward",
        "hopper/persistent_product.cuh",
        "offset ^ 16 * 2 * part",
        "offset + 16 * 2 * part",
    ),
    Fault("the first rows over and over", "grad_input", "hopper/persistent_product.cuh", "+ 16 * kRowBytes * part", ""),
    Fault(
        "tokens of wide tiles",
        "forward",
        "hopper/persistent_product.cuh",
        "index / of_rows * kTokens",
        "index / of_rows * 256",
    ),
    Fault(
        "boxes of wide tiles",
        "grad_input",
        "hopper/persistent_product.cuh",
        "p.token_count, depth, width)",
        "p.token_count, depth, kWideTile)",
    ),
    Fault(
        "u and v of the wrong rows",
        "forward",
        "hopper/persistent_product.cuh",
        "row_scales[i % 2]",
        "row_scales[i / 2]",
    ),
    Fault(
        "the first group's v throughout",
        "grad_input",
        "hopper/persistent_product.cuh",
        "segment++, row",
        "0 * segment++, row",
    ),
    Fault(
        "one split's tokens in another's",
        "grad_scales",
        "hopper/persistent_gram.cuh",
        "item.first_step = item.split * p.split_steps",
        "item.first_step = 0",
    ),
]


#: In the order of work, in the layout of boxes, in the arithmetic.
QUICK = ("forward: sums read too early", "grad_input: no swizzle in loads", "forward: u and v of the wrong rows")


@pytest.mark.parametrize("fault", parameters(FAULTS, *QUICK))
def test_fault_is_noticed(tmp_path: Path, fault: Fault):
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    machine = HopperMachine(build_hopper(fault.plant(tmp_path / "cuda"), (fault.seen_in,)))
    assert any(_differs(machine, fault.seen_in, warps) for warps in (FORWARDS, BACKWARDS, SHUFFLED))


def _differs(machine: HopperMachine, name: str, warps: int) -> bool:
    # groups of a tile and a half, the ring turned more than twice, several tiles a block, two splits
    p = make_problem(600, 384, 392, 2, torch.bfloat16)
    # 6 multiprocessors make wide tiles worth their while, 132 narrow ones
    return any(_differs_on(machine, name, warps, p, count) for count in (6, 132))


def _differs_on(machine: HopperMachine, name: str, warps: int, p: Problem, multiprocessors: int) -> bool:
    try:
        got = machine.solve(p, multiprocessors, passes=(name,), warps=warps)
    except MachineError:
        return True
    exact, plain = (
        differentiate(p, torch.float64),
        differentiate(p, torch.bfloat16 if name != "grad_scales" else torch.float32),
    )
    try:
        for result in RESULTS[name]:
            assert_close(result, getattr(got, result), getattr(plain, result), getattr(exact, result))
    except AssertionError:
        return True
    return False


def test_the_source_as_it_is_shows_no_fault(hopper):
    assert not any(_differs(hopper, name, warps) for name in RESULTS for warps in (FORWARDS, BACKWARDS, SHUFFLED))
