"""What a call costs the CPU in eager mode: a tiny layer, its GPU work enqueued and not waited for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import implementations, results, timing
from benchmarks.agreement import Formula
from benchmarks.implementations import make_inputs
from benchmarks.results import LaunchCase
from benchmarks.suite import ROUNDS, Outcome, Rivals, outcome, parametrize, turn_by_turn
from benchmarks.timing import Variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: M, N and K: so small that on a CPU too the call is mostly what surrounds the arithmetic.
M, N, K = 8, 64, 64
#: Calls between two looks at the clock; a GPU's queue takes over a thousand kernels before the CPU has to wait.
BATCH = 20
#: Seconds that the rounds of a group may take.
BUDGET = 2.0
#: What a call is named in the results -> the direction of an implementation.
CALLS = {"no_grad": "forward_no_grad", "forward": "forward", "both": "both"}
NAMES = (results.OURS, *implementations.BACKENDS, results.PLAIN, results.FORMULA, results.LORA)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    tests = []
    for dtype in option("--dtype") if "launch".startswith(option("--chunk") or "") else ():
        for call in CALLS:
            group = Rivals("launch", "launch", (call, dtype), f"launch-{call}-{dtype}", place=3)
            for name in NAMES:
                if name in implementations.names(CALLS[call], DEVICE):
                    tests.append((group, name))
    parametrize(metafunc, tests)


def _measure(group: Rivals, rounds: tuple[int, int] | None, names: list[str]) -> dict[str, Outcome]:
    call, dtype = group.key
    inputs = make_inputs(M, N, K, 1, getattr(torch, dtype), DEVICE)
    formula = Formula(implementations.call(results.FORMULA, CALLS[call], inputs).run, inputs.x.dtype)
    more: dict[str, dict[str, Any]] = {}
    backends: dict[str, str | None] = {}

    def variant(name: str) -> Variant:
        backends[name] = implementations.served_by(name, inputs.x, inputs.weight)
        made = implementations.call(name, CALLS[call], inputs)
        if name not in results.OTHER_FUNCTIONS:
            with _around(name, call):
                more[name] = {"error_vs_formula": formula.error(made.run())}
        return Variant([made], functools.partial(_around, name, call))

    found = timing.interleaved(
        {name: functools.partial(variant, name) for name in names},
        timing.Batches(BATCH, wait=False),
        BUDGET,
        rounds or ROUNDS["launch"],
        warm_seconds=0.3 if rounds is None else 0.0,
    )
    outcomes = {}
    for name in names:
        case = LaunchCase(call, dtype, name, backends.get(name))
        outcomes[name] = outcome(case, found[name], more.get(name, {}))
    return outcomes


@contextlib.contextmanager
def _around(name: str, call: str) -> Iterator[None]:
    """The backend, and ``no_grad`` around the whole batch: a user enters it once, not at each call."""
    with implementations.context(name)(), torch.set_grad_enabled(call != "no_grad"):
        yield


test_launch = turn_by_turn(_measure)
