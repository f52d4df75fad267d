"""The contest: candidates that launch and compute right are timed in turns, and one must beat the default twice.

Nothing here knows a device: launching, checking and timing are functions that are passed in.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.tuned import Entry
from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.tune.candidates import Candidate, describe

#: A candidate's median must be this many times faster than the default's, and their quartiles must not overlap.
MARGIN = 1.02

#: What was measured at an M serves others up to this ratio away.
NEAR = 2**0.5

#: (candidate, number of the set of tensors) -> the pass's results.
Launch = Callable[[Candidate, int], tuple[Tensor, ...]]

#: (launches that take the number of the set, sets, rounds) -> seconds of one launch, for each and round.
Timer = Callable[[Sequence[Callable[[int], object]], int, int], list[list[float]]]


class DeviceLostError(RuntimeError):
    """A launch left the device unusable for this process."""


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
    """What came of one problem.

    Attributes:
        candidates: all of them, the default first, and of each backend its own choice first.
        best: the winner, or the default where none won; None if nothing could be measured.
        spreads: candidate -> its times, of the last contest it was in.
        failures: candidate -> why it was left out.
    """

    problem: Problem
    candidates: Sequence[Candidate]
    best: Candidate | None = None
    spreads: dict[Candidate, Spread] = field(default_factory=dict)
    failures: dict[Candidate, str] = field(default_factory=dict)

    @property
    def default(self) -> Candidate:
        """What serves unless something else is asked for or measured."""
        return self.candidates[0]

    @property
    def gain(self) -> float | None:
        """How many times faster the best is than the default; None where one of them has no time."""
        times = [self.spreads[one].median for one in (self.default, self.best) if one in self.spreads]
        return times[0] / times[1] if len(times) == 2 else None

    def entry(self, device: torch.device, date: str) -> Entry:
        """What the file keeps; without a tile where a backend's own choice won, which it can make for other M too.

        Raises:
            ValueError: nothing could be measured.
        """
        if self.best is None:
            raise ValueError(f"{describe(self.problem)}: nothing could be measured")
        own = next(one for one in self.candidates if one.backend == self.best.backend)
        measured: dict[str, Any] = {"date": date, "candidates": len(self.spreads), "default": str(self.default)}
        for name, one in (("default_seconds", self.default), ("seconds", self.best)):
            if one in self.spreads:
                measured[name] = self.spreads[one].median
        kernel, m, n, k, groups, dtype, weight_dtype, tf32 = self.problem
        where = Where.of(self.best.backend, device)
        shape = kernel, dtype, weight_dtype, tf32, (n, k, groups), (math.ceil(m / NEAR), math.floor(m * NEAR))
        return Entry(
            where.device, where, *shape, self.best.backend, None if self.best == own else self.best.tile, measured
        )


def rules(results: Iterable[Result], device: torch.device, date: str) -> list[Entry]:
    """Entries to ship, for every N and K and whatever is installed: where all shapes measured at an M take least,
    together, by another backend than the default. A band begins at a measured M and ends before the next one.
    """
    shapes: dict[Any, list[Result]] = defaultdict(list)
    for result in results:
        shapes[result.problem._replace(n=0, k=0, groups=0)].append(result)
    found = []
    for problem, same in shapes.items():
        totals = {name: _total(name, same) for name in dict.fromkeys(one.backend for one in same[0].spreads)}
        default = same[0].default.backend
        best = min(totals, key=totals.__getitem__, default=default)
        if totals.get(default, 0.0) <= MARGIN * totals.get(best, 0.0):
            continue
        later = [other.m for other in shapes if other.m > problem.m and other == problem._replace(m=other.m)]
        tokens = (problem.m, min(later) - 1 if later else math.inf)
        measured = {"date": date, "shapes": len(same), "default": default, "seconds": totals}
        name = Where.of(best, device).device if device.type == "cuda" else device.type
        types = problem.kernel, problem.dtype, problem.weight_dtype, problem.tf32
        found.append(Entry(name, None, *types, None, tokens, best, None, measured))
    return found


def _total(backend: str, results: Iterable[Result]) -> float:
    """Seconds of a backend's fastest candidate, over all results; infinite where one has none."""
    times = ([spread.median for one, spread in r.spreads.items() if one.backend == backend] for r in results)
    return sum(min(found, default=float("inf")) for found in times)


def contest(
    problem: Problem,
    candidates: Sequence[Candidate],
    launch: Launch,
    misfit: Callable[[Sequence[Tensor]], str | None],
    timer: Timer,
    *,
    copies: int,
    rounds: int,
    synchronize: Callable[[], object],
) -> Result:
    """Find the fastest of ``candidates``, of which the first is the default.

    Args:
        problem: which pass at which shape.
        candidates: at least one.
        launch, misfit, timer: see the types; ``misfit`` says why results (for set 0) are wrong, or None.
        copies: sets of tensors.
        rounds: at least two.
        synchronize: waits for the device, and raises what a launch did wrong.

    Raises:
        DeviceLostError: after a failed launch the device does not answer any more.
    """
    result = Result(problem, candidates)
    sound = []
    for one in candidates:
        why = _trial(partial(launch, one, 0), misfit, synchronize)
        if why is None:
            sound.append(one)
        else:
            result.failures[one] = why
    if not sound:
        return result

    def compete(entrants: Sequence[Candidate]) -> None:
        seconds = timer([partial(launch, one) for one in entrants], copies, rounds)
        result.spreads.update(zip(entrants, map(Spread.of, seconds), strict=True))

    compete(sound)
    fastest = min(sound, key=lambda one: result.spreads[one].median)
    if result.default not in sound:
        result.best = fastest
        return result
    result.best = result.default
    if beats(result.spreads[fastest], result.spreads[result.default]):
        # the least of many noisy medians is too small: only a second contest, of the two alone, tells
        compete([result.default, fastest])
        if beats(result.spreads[fastest], result.spreads[result.default]):
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
