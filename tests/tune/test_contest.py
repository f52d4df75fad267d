"""The contest with made-up launches and times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.tune.candidates import Candidate
from rlrr_kernels.tune.contest import MARGIN, Result, Spread, beats, contest, rules
from tests.tune.entries import CPU, PROBLEM


@dataclass(frozen=True)
class Tile:
    """A backend's choice."""

    size: int


A, B, C = Candidate("cpu", Tile(64)), Candidate("cpu", Tile(128)), Candidate("panels")
RESULT = (torch.ones(2),)


class Clock:
    """A timer with made-up times: for each contest, the seconds of each entrant's rounds."""

    def __init__(self, *contests):
        self.contests, self.asked = list(contests), []

    def __call__(self, runs, copies, rounds):
        for run in runs:
            assert run(copies - 1) is RESULT
        self.asked.append((len(runs), copies, rounds))
        return [list(seconds) for seconds in self.contests.pop(0)]


def steady(seconds):
    """Return five rounds with one per cent of noise around a median."""
    return [seconds * factor for factor in (0.99, 0.995, 1.0, 1.005, 1.01)]


def hold(clock, choices=(A, B, C), launch=lambda choice, copy: RESULT, misfit=lambda got: None, sync=lambda: None):
    return contest(PROBLEM, choices, launch, misfit, clock, copies=3, rounds=5, synchronize=sync)


def test_the_fastest_wins_if_it_wins_again():
    clock = Clock([steady(10), steady(9), steady(8)], [steady(10), steady(8.5)])
    result = hold(clock)
    assert clock.asked == [(3, 3, 5), (2, 3, 5)]
    assert (result.default, result.best) == (A, C)
    assert result.gain == pytest.approx(10 / 8.5)  # of the second contest, whose winner was not chosen by it
    assert result.spreads[B].median == 9


def test_the_default_stays_if_the_second_contest_is_lost():
    assert hold(Clock([steady(10), steady(9), steady(8)], [steady(10), steady(9.9)])).best == A


def test_the_default_stays_where_it_is_fastest():
    clock = Clock([steady(8), steady(9), steady(10)])
    result = hold(clock)
    assert result.best == A
    assert result.gain == 1
    assert len(clock.asked) == 1


@pytest.mark.parametrize(
    ("challenger", "wins"),
    [
        (steady(10 / MARGIN * 0.999), True),
        (steady(10 / MARGIN * 1.001), False),
        ([5, 5, 8, 9.96, 9.99], False),  # a fast median, but its quartiles reach the default's
        ([5, 5, 8, 9.9, 20], True),
    ],
)
def test_faster_means_by_more_than_the_noise(challenger, wins):
    assert beats(Spread.of(challenger), Spread.of(steady(10))) == wins


def test_what_fails_or_is_wrong_is_left_out_with_the_reason():
    def launch(choice, copy):
        if choice == B:
            raise RuntimeError("out of resource: shared memory\nand pages more")
        return RESULT if choice == A else (torch.zeros(2),)

    def misfit(got):
        return None if got is RESULT else "y: error 1"

    result = hold(Clock([steady(10)]), launch=launch, misfit=misfit)
    assert result.failures == {B: "RuntimeError: out of resource: shared memory", C: "y: error 1"}
    assert result.best == A


def test_launches_that_differ_are_left_out():
    values = iter(range(100))

    def launch(choice, copy):
        return (torch.tensor(next(values)),) if choice == B else RESULT

    result = hold(Clock([steady(10), steady(9)], [steady(10), steady(9)]), launch=launch)
    assert result.failures == {B: "two launches differ"}
    assert result.best == C


def test_a_default_that_fails_is_replaced_by_what_works():
    def launch(choice, copy):
        if choice == A:
            raise RuntimeError("no")
        return RESULT

    result = hold(Clock([steady(10), steady(9)]), launch=launch)
    assert result.best == C
    assert result.gain is None
    assert result.entry(CPU, "2026-01-01").backend == "panels"


def test_nothing_works():
    result = hold(Clock(), misfit=lambda got: "wrong")
    assert result.best is None
    assert set(result.failures) == {A, B, C}
    with pytest.raises(ValueError, match="nothing could be measured"):
        result.entry(CPU, "2026-01-01")


def test_the_entry_names_the_backend_and_a_tile_that_is_not_its_own_choice():
    found = hold(Clock([steady(10), steady(8), steady(9)], [steady(10), steady(8)])).entry(CPU, "2026-01-01")
    assert (found.kernel, found.dtype, found.layer) == ("forward", torch.float32, (768, 3072, 1))
    assert (found.tokens, found.backend, found.tile) == ((708, 1414), "cpu", {"size": 128})
    assert found.where == Where.of("cpu", CPU)
    assert found.measured == {
        **{"date": "2026-01-01", "candidates": 3, "default": "cpu, 64 size"},
        **{"default_seconds": 10, "seconds": 8},
    }
    stays = hold(Clock([steady(8), steady(9), steady(10)])).entry(CPU, "2026-01-01")
    assert (stays.backend, stays.tile, stays.measured["seconds"]) == ("cpu", None, 8)
    other = hold(Clock([steady(10), steady(9), steady(8)], [steady(10), steady(8)])).entry(CPU, "2026-01-01")
    assert (other.backend, other.tile) == ("panels", None)


def test_one_entry_rules_where_another_backend_wins_over_all_of_them():
    def result(m, n, cpu, panels):
        spreads = {A: cpu * 2, B: cpu, C: panels}
        problem = PROBLEM._replace(m=m, n=n)
        return Result(problem, [A, B, C], A, {one: Spread(s, s, s) for one, s in spreads.items()})

    def found(*results):
        return {(e.device, e.where, e.layer, e.tokens, e.backend) for e in rules(results, CPU, "2026-01-01")}

    few, many = [result(10, 1, 1, 3), result(10, 2, 9, 5)], [result(99, 1, 1, 3), result(99, 2, 9, 8)]
    assert found(*few, *many) == {("cpu", None, None, (10, 98), "panels")}
    assert found(*few) == {("cpu", None, None, (10, math.inf), "panels")}
    assert found(*many) == found() == set()
