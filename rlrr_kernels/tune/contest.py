"""The contest: candidates that launch and compute right are timed in turns; the winner must beat the default twice.

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
from rlrr_kernels.io.checks import error_line
from rlrr_kernels.tune.candidates import Candidate, describe

#: To win, a median must be this many times as fast as the default's, and the quartiles must not overlap.
MARGIN = 1.02

#: An entry that was measured at an M holds for others up to this ratio away.
NEAR = 2**0.5

#: (candidate, number of the set of tensors) -> the pass's results.
Launch = Callable[[Candidate, int], tuple[Tensor, ...]]

#: (launches that take the number of the set, sets, rounds) -> seconds of one launch, for each and round.
Timer = Callable[[Sequence[Callable[[int], object]], int, int], list[list[float]]]


class DeviceLostError(RuntimeError):
    """A launch left the device unusable for this process."""


class Spread(NamedTuple):
    """Seconds of a launch: the median and the quartiles over the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Return the spread of two rounds or more."""
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, q1, q3)


def beats(challenger: Spread, champion: Spread) -> bool:
    """Return whether the challenger is faster by more than the noise."""
    return champion.median > MARGIN * challenger.median and challenger.q3 < champion.q1


@dataclass
class Result:
    """The result of one problem.

    Attributes:
        candidates: All of them; the default first, and each backend's own choice before its others.
        best: The winner, or the default if none won; None if nothing could be measured.
        spreads: Candidate -> its times in the last contest that it was in.
        failures: Candidate -> why it was left out.
    """

    problem: Problem
    candidates: Sequence[Candidate]
    best: Candidate | None = None
    spreads: dict[Candidate, Spread] = field(default_factory=dict)
    failures: dict[Candidate, str] = field(default_factory=dict)

    @property
    def default(self) -> Candidate:
        """What serves if nothing else is asked for or measured."""
        return self.candidates[0]

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default the best is; None if one of them has no time."""
        times = [self.spreads[one].median for one in (self.default, self.best) if one in self.spreads]
        return times[0] / times[1] if len(times) == 2 else None

    def entry(self, device: torch.device, date: str) -> Entry:
        """Return the entry for the file.

        It has no tile if a backend's own choice won, as the backend can make that choice for other M too.

        Raises:
            ValueError: If nothing could be measured.
        """
        if self.best is None:
            raise ValueError(f"{describe(self.problem)}: nothing could be measured")
        own = next(one for one in self.candidates if one.backend == self.best.backend)
        measured: dict[str, Any] = {"date": date, "candidates": len(self.spreads), "default": str(self.default)}
        for name, one in (("default_seconds", self.default), ("seconds", self.best)):
            if one in self.spreads:
                measured[name] = self.spreads[one].median
        kernel, m, n, k, groups, dtype, weight_dtype, tf32, rank = self.problem
        where = Where.of(self.best.backend, device)
        shape = kernel, dtype, weight_dtype, tf32, (n, k, groups), (math.ceil(m / NEAR), math.floor(m * NEAR))
        tile = None if self.best == own else self.best.tile
        return Entry(where.device, where, *shape, self.best.backend, tile, measured, rank)


def rules(results: Iterable[Result], device: torch.device, date: str) -> list[Entry]:
    """Return the entries to ship, which hold for every N and K and for all versions.

    There is one where all shapes measured at an M together take least time by another backend than the default. It
    holds from that M up to the next one that was measured.
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
        found.append(Entry(name, None, *types, None, tokens, best, None, measured, problem.rank))
    return found


def _total(backend: str, results: Iterable[Result]) -> float:
    """Return the seconds of a backend's fastest candidates over all results; infinite if one result has none."""
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
        problem: The pass and its sizes.
        candidates: At least one.
        launch: Launches a candidate on a set of tensors.
        misfit: Returns why results (of set 0) are wrong, or None.
        timer: Times launches.
        copies: Number of sets of tensors.
        rounds: At least two.
        synchronize: Waits for the device, and raises errors of earlier launches.

    Raises:
        DeviceLostError: If the device does not answer any more after a failed launch.
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
        # the least of many noisy medians is too small: a second contest, of these two alone, decides
        compete([result.default, fastest])
        if beats(result.spreads[fastest], result.spreads[result.default]):
            result.best = fastest
    return result


def require(synchronize: Callable[[], object], after: Exception) -> None:
    """Check that the device still answers after an error.

    Raises:
        DeviceLostError: If it does not.
    """
    try:
        synchronize()
    except Exception as lost:
        raise DeviceLostError(error_line(after)) from lost


def _trial(
    launch: Callable[[], tuple[Tensor, ...]],
    misfit: Callable[[Sequence[Tensor]], str | None],
    synchronize: Callable[[], object],
) -> str | None:
    """Return why a candidate is left out, or None."""
    try:
        first = launch()
        second = launch()
        synchronize()
    except Exception as error:  # compiler, launcher and driver raise errors of different types
        require(synchronize, error)
        return error_line(error)
    if not all(map(torch.equal, first, second)):
        return "two launches differ"
    return misfit(first)
