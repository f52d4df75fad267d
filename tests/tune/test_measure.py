"""The contest with made-up launches and times."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels.backends.triton.config import Config
from rlrr_kernels.tune.measure import MARGIN, DeviceLostError, Spread, beats, contest
from rlrr_kernels.tune.problem import Task
from tests.tune.entries import FORWARD, GRAD_SCALES, WHERE

A, B, C = (Config(size, 64, 64, 4, 3) for size in (64, 128, 256))
TASK = Task(FORWARD, 100, torch.bfloat16, torch.bfloat16)
RESULT = (torch.ones(2),)


class Clock:
    """A timer that says what it is told: for each contest, the seconds of each entrant's rounds."""

    def __init__(self, *contests):
        self.contests, self.asked = list(contests), []

    def __call__(self, runs, copies, rounds):
        for run in runs:
            assert run(copies - 1) is RESULT
        self.asked.append((len(runs), copies, rounds))
        return [list(seconds) for seconds in self.contests.pop(0)]


def steady(seconds):
    """Five rounds, one per cent of noise around a median."""
    return [seconds * factor for factor in (0.99, 0.995, 1.0, 1.005, 1.01)]


def hold(clock, choices=(A, B, C), launch=lambda choice, copy: RESULT, misfit=lambda got: None, sync=lambda: None):
    return contest(TASK, choices, launch, misfit, clock, copies=3, rounds=5, synchronize=sync)


def test_the_fastest_wins_if_it_wins_again():
    clock = Clock([steady(10), steady(9), steady(8)], [steady(10), steady(8.5)])
    result = hold(clock)
    assert clock.asked == [(3, 3, 5), (2, 3, 5)]
    assert (result.heuristic, result.best) == (A, C)
    assert result.gain == pytest.approx(10 / 8.5)  # of the second contest, whose winner was not chosen by it
    assert result.spreads[B].median == 9


def test_who_does_not_win_again_does_not_win():
    assert hold(Clock([steady(10), steady(9), steady(8)], [steady(10), steady(9.9)])).best == A


def test_the_heuristic_stays_where_it_is_fastest():
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
        ([5, 5, 8, 9.96, 9.99], False),  # a fast median, but its quartiles reach the heuristic's
        ([5, 5, 8, 9.9, 20], True),
    ],
)
def test_faster_means_by_more_than_the_noise(challenger, wins):
    assert beats(Spread.of(challenger), Spread.of(steady(10))) == wins


def test_spread():
    assert Spread.of([4, 1, 3, 2, 5]) == (3, 2, 4)


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


def test_a_heuristic_that_fails_is_replaced_by_what_works():
    def launch(choice, copy):
        if choice == A:
            raise RuntimeError("no")
        return RESULT

    result = hold(Clock([steady(10), steady(9)]), launch=launch)
    assert result.best == C
    assert result.gain is None
    assert result.entry(WHERE, "2026-01-01").config == C


def test_nothing_works():
    result = hold(Clock(), misfit=lambda got: "wrong")
    assert result.best is None
    assert set(result.failures) == {A, B, C}
    with pytest.raises(ValueError, match="nothing could be measured"):
        result.entry(WHERE, "2026-01-01")


def test_a_device_that_is_lost_ends_the_contest():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(DeviceLostError, match="illegal memory access"):
        hold(Clock(), sync=broken)


def test_what_a_launch_did_wrong_shows_at_the_wait():
    errors = iter([RuntimeError("misaligned"), None, None, None])

    def sync():
        error = next(errors)
        if error:
            raise error

    result = hold(Clock([steady(10), steady(9)]), sync=sync)
    assert result.failures == {A: "RuntimeError: misaligned"}


def test_the_entry_says_what_was_found():
    result = hold(Clock([steady(10), steady(9), steady(8)], [steady(10), steady(8)]))
    entry = result.entry(WHERE, "2026-01-01")
    assert (entry.where, entry.layer, entry.m, entry.config, entry.split_tokens) == (WHERE, FORWARD, 100, C, None)
    assert entry.measured == {
        "date": "2026-01-01",
        "dtype": "bfloat16",
        "candidates": 3,
        "heuristic_seconds": 10,
        "best_seconds": 8,
    }
    stays = hold(Clock([steady(8), steady(9), steady(10)])).entry(WHERE, "2026-01-01")
    assert stays.config is None
    assert stays.measured["best_seconds"] == 8


def test_the_tokens_of_a_split_are_part_of_the_choice():
    task = Task(GRAD_SCALES, 100, torch.bfloat16, torch.bfloat16)
    clock = Clock([steady(10), steady(8)], [steady(10), steady(8)])
    result = contest(
        task,
        [(A, 64), (A, 128)],
        lambda choice, copy: RESULT,
        lambda got: None,
        clock,
        copies=1,
        rounds=5,
        synchronize=lambda: None,
    )
    entry = result.entry(WHERE, "2026-01-01")
    assert (entry.config, entry.split_tokens) == (A, 128)
