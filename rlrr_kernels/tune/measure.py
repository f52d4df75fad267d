"""The contest: candidates that launch and compute right are timed in turns, and one must beat the heuristic twice.

Nothing here knows a GPU: launching, checking and timing are functions that are passed in.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.backends.triton.config import Config
from rlrr_kernels.backends.triton.tuned import Choice
from rlrr_kernels.backends.triton.tuned_file import Entry, Where
from rlrr_kernels.tune.problem import Task

#: A candidate's median must be this many times faster than the heuristic's, and their quartiles must not overlap.
MARGIN = 1.02

#: (choice, number of the set of tensors) -> the kernel's results.
Launch = Callable[[Choice, int], tuple[Tensor, ...]]

#: (launches that take the number of the set, sets, rounds) -> seconds of one launch, for each and round.
Timer = Callable[[Sequence[Callable[[int], object]], int, int], list[list[float]]]


class DeviceLostError(RuntimeError):
    """A launch left the GPU unusable for this process."""


class Spread(NamedTuple):
    """Seconds of a launch: median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """At least two rounds."""
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3)


def beats(challenger: Spread, champion: Spread) -> bool:
    """Whether it is faster by more than the noise."""
    return champion.median > MARGIN * challenger.median and challenger.q3 < champion.q1


@dataclass
class Result:
    """What came of one task.

    Attributes:
        best: the winner, or the heuristic's choice where none won; None if nothing could be measured.
        spreads: choice -> its times, of the last contest it was in.
        failures: choice -> why it was left out.
    """

    task: Task
    heuristic: Choice
    best: Choice | None = None
    spreads: dict[Choice, Spread] = field(default_factory=dict)
    failures: dict[Choice, str] = field(default_factory=dict)

    @property
    def gain(self) -> float | None:
        """How many times faster the best is than the heuristic's; None where one of them has no time."""
        times = [self.spreads[choice].median for choice in (self.heuristic, self.best) if choice in self.spreads]
        return times[0] / times[1] if len(times) == 2 else None

    def entry(self, where: Where, date: str) -> Entry:
        """What the table keeps.

        Raises:
            ValueError: nothing could be measured.
        """
        if self.best is None:
            raise ValueError(f"{self.task}: nothing could be measured")
        config: Config | None = None
        split_tokens: int | None = None
        if isinstance(self.best, Config) and self.best != self.heuristic:
            config = self.best
        elif isinstance(self.best, tuple) and self.best != self.heuristic:
            config, split_tokens = self.best
        measured: dict[str, Any] = {"date": date, "dtype": str(self.task.dtype).removeprefix("torch.")}
        measured["candidates"] = len(self.spreads)
        for name, choice in (("heuristic", self.heuristic), ("best", self.best)):
            if choice in self.spreads:
                measured[f"{name}_seconds"] = self.spreads[choice].median
        return Entry(where, self.task.layer, self.task.m, config, split_tokens, measured)


def contest(
    task: Task,
    choices: Sequence[Choice],
    launch: Launch,
    misfit: Callable[[Sequence[Tensor]], str | None],
    timer: Timer,
    *,
    copies: int,
    rounds: int,
    synchronize: Callable[[], object],
) -> Result:
    """Find the fastest of ``choices``, of which the first is the heuristic's.

    Args:
        task: which kernel at which shape.
        choices: at least one.
        launch, misfit, timer: see the types; ``misfit`` says why results (for set 0) are wrong, or None.
        copies: sets of tensors. rounds: at least two.
        synchronize: waits for the device, and raises what a launch did wrong.

    Raises:
        DeviceLostError: after a failed launch the device does not answer any more.
    """
    result = Result(task, choices[0])
    sound = []
    for choice in choices:
        why = _trial(partial(launch, choice, 0), misfit, synchronize)
        if why is None:
            sound.append(choice)
        else:
            result.failures[choice] = why
    if not sound:
        return result

    def compete(entrants: Sequence[Choice]) -> None:
        seconds = timer([partial(launch, choice) for choice in entrants], copies, rounds)
        result.spreads.update(zip(entrants, map(Spread.of, seconds), strict=True))

    compete(sound)
    fastest = min(sound, key=lambda choice: result.spreads[choice].median)
    if result.heuristic not in sound:
        result.best = fastest
        return result
    result.best = result.heuristic
    if beats(result.spreads[fastest], result.spreads[result.heuristic]):
        # the least of many noisy medians is too small: only a second contest, of the two alone, tells
        compete([result.heuristic, fastest])
        if beats(result.spreads[fastest], result.spreads[result.heuristic]):
            result.best = fastest
    return result


def first_line(error: Exception) -> str:
    """What went wrong, short: compilers write pages."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def require(synchronize: Callable[[], object], after: Exception) -> None:
    """Make sure that the device still answers after an error; raises :class:`DeviceLostError` if not."""
    try:
        synchronize()
    except Exception as lost:
        raise DeviceLostError(first_line(after)) from lost


def _trial(
    launch: Callable[[], tuple[Tensor, ...]],
    misfit: Callable[[Sequence[Tensor]], str | None],
    synchronize: Callable[[], object],
) -> str | None:
    """Why a candidate is out, or None."""
    try:
        first = launch()
        second = launch()
        synchronize()
    except Exception as error:  # the compiler, the launcher and the driver have no common one
        require(synchronize, error)
        return first_line(error)
    if not all(map(torch.equal, first, second)):
        return "two launches differ"
    return misfit(first)
