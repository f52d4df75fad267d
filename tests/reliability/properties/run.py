"""Runs a number of examples on a backend, and counts those that passed."""

from __future__ import annotations

from collections import Counter

import hypothesis
from hypothesis import Phase, given, note, settings

from tests.reliability.properties.cases import Case
from tests.reliability.properties.properties import examine
from tests.reliability.properties.solvers import backend
from tests.reliability.properties.strategies import cases


def run(name: str, examples: int, seed: int, shrink: bool = True) -> Counter[str]:
    """Examine so many cases of a backend, drawn from ``seed``; what passed, by property.

    A failing case is printed with the command that runs it alone, and shrunk before if ``shrink``.
    """
    target = backend(name)
    passed: Counter[str] = Counter()
    properties = target.domain.also
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    for index, also in enumerate(properties):  # as many of each, which Hypothesis's own draws are not
        share = (examples + index) // len(properties)

        # the seed decides all: nothing is remembered from an earlier run, and no clock stops an example
        @settings(max_examples=share, database=None, deadline=None, print_blob=True, phases=phases)
        @hypothesis.seed(seed * len(properties) + index)
        @given(case=cases(target.domain, also))
        def example(case: Case) -> None:
            note(f"python -m tests.reliability.soak --backend {name} --case {case.text()!r}")
            examine(target, case)
            passed[case.also or "values"] += 1

        if share:
            example()
    return passed
