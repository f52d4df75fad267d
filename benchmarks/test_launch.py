"""CPU time of a call in eager mode: a tiny layer, whose GPU work is enqueued and not waited for."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import implementations, results, timing
from benchmarks.implementations import make_inputs
from benchmarks.measures import Formula
from benchmarks.results import LaunchCase
from benchmarks.suite import (
    DEVICE,
    RANKS_PLACE,
    ROUNDS,
    Outcome,
    Rivals,
    interleaved,
    outcome,
    parametrize,
    rank_label,
    turn_by_turn,
)
from benchmarks.timing import Variant

#: M, N and K: so small that on a CPU too the call is mostly what surrounds the arithmetic.
M, N, K = 8, 64, 64
#: Calls between two readings of the clock; a GPU's queue takes over a thousand kernels before the CPU has to wait.
BATCH = 20
#: Name of a call in the results -> direction of an implementation.
CALLS = {"no_grad": "forward_no_grad", "forward": "forward", "both": "both"}
NAMES = (results.OURS, *implementations.BACKENDS, results.PLAIN, results.FORMULA, results.LORA)
RANKED = (*NAMES, *results.HIRAS.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a group for each call, dtype and rank."""
    option = metafunc.config.getoption
    tests = []
    dtypes = option("--dtype") if "launch".startswith(option("--chunk") or "") else ()
    for rank, dtype, call in itertools.product(results.RANKS, dtypes, CALLS):
        label, place = f"launch-{call}-{dtype}{rank_label(rank)}", 3 if rank == 1 else RANKS_PLACE
        group = Rivals("launch", "launch", (call, dtype, rank), label, place)
        there = implementations.names(CALLS[call], DEVICE, rank=rank)
        tests += [(group, name) for name in (NAMES if rank == 1 else RANKED) if name in there]
    parametrize(metafunc, tests)


def _measure(group: Rivals, rounds: tuple[int, int] | None, names: list[str]) -> dict[str, Outcome]:
    call, dtype, rank = group.key
    inputs = make_inputs(M, N, K, 1, getattr(torch, dtype), DEVICE, rank=rank)
    formula = Formula(implementations.call(results.FORMULA, CALLS[call], inputs).run, inputs.x.dtype)
    more: dict[str, dict[str, Any]] = {}
    backends: dict[str, str | None] = {}

    def variant(name: str) -> Variant:
        backends[name] = implementations.served_by(name, inputs.x, inputs.weight, rank)
        made = implementations.call(name, CALLS[call], inputs)
        if name not in results.OTHER_FUNCTIONS:
            with _around(name, call):
                more[name] = {"error_vs_formula": formula.error(made.run())}
        return Variant([made], functools.partial(_around, name, call))

    found = interleaved(
        names,
        variant,
        rounds or ROUNDS["launch"],
        stopwatch=timing.Batches(BATCH, wait=False),
        budget=2.0,
        warm_seconds=0.3 if rounds is None else 0.0,
    )
    return {
        name: outcome(LaunchCase(call, dtype, name, backends.get(name), rank), found[name], more.get(name))
        for name in names
    }


@contextlib.contextmanager
def _around(name: str, call: str) -> Iterator[None]:
    """Enter the backend, and ``no_grad`` around the whole batch: a user enters it once, not at each call."""
    with implementations.context(name)(), torch.set_grad_enabled(call != "no_grad"):
        yield


test_launch = turn_by_turn(_measure)
