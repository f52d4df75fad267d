"""What the suites share: groups of rivals are measured in turns, handed to pytest-benchmark and written to files."""

from __future__ import annotations

import functools
import math
import re
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import chunks, results, timing
from benchmarks.results import Result
from benchmarks.timing import Rounds, Variant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class ReplayTimer:
    """A timer for pytest-benchmark that returns durations which were measured before.

    Rivals are timed in turns, all of a group together, but pytest-benchmark times one test after another: this gives
    its table and JSON the interleaved times.
    """

    __name__ = "replay"

    def __init__(self) -> None:
        self._now = 0.0
        self._steps: list[float] = []

    def load(self, seconds: Iterable[float]) -> None:
        """Set the next durations, in order."""
        self._now = 0.0
        self._steps = [step for duration in seconds for step in (0.0, duration)][::-1]

    def __call__(self) -> float:
        if not self._steps:
            raise RuntimeError("replay: asked for more durations than were measured")
        self._now += self._steps.pop()
        return self._now


REPLAY = ReplayTimer()

#: Least and most rounds of a suite's groups, if they are not :data:`~benchmarks.timing.ROUNDS`.
ROUNDS = {"launch": (10, 200)}

#: A session that does not measure everything measures only the strongest rivals, and no group that would end later.
SLICE_MINUTES = 7.0
STRONGEST = frozenset(
    (
        *(results.OURS, results.FORMULA, results.FORMULA_COMPILED, results.RECOMPUTE, results.RECOMPUTE_COMPILED),
        *(results.PLAIN, results.PRODUCTS, results.COMPOSED, results.LAYER_NORM),
        *(results.OFFICIAL, results.OFFICIAL_COMPILED, results.PROBE),
        *(name for rank, name in results.HIRAS.items() if rank > 1),
    )
)

#: Of the groups of ranks above 1: after all others.
RANKS_PLACE = 10

#: What the others are compared with: ours, the formula of each suite, and cheap rivals that show the scale.
YARDSTICKS = (results.OURS, results.GRAD_SCALES, results.FORMULA, results.OFFICIAL, results.PLAIN, results.BARE_GRAD)


@dataclass(frozen=True)
class Rivals:
    """A group: all parameters of a test but the implementation.

    Attributes:
        suite, chunk: Where its results go.
        key: Distinguishes it from other groups of the suite.
        label: Heads pytest-benchmark's table.
        place: Groups of a lower place are measured first, as the time may not suffice for the last.
        work: Of a call, relative to other groups of the suite.
    """

    suite: str
    chunk: str
    key: tuple[Any, ...]
    label: str
    place: int = 0
    work: float = 1.0


def rank_label(rank: int) -> str:
    """Return the part of a group's label by which ``-k`` selects a rank; nothing for rank 1."""
    return "" if rank == 1 else f"-r{rank}"


@dataclass
class Outcome:
    """A result, and whether its only error is that the rival is not here; such a result is not written."""

    result: Result
    unavailable: bool = False


def outcome(case: results.Case, rounds: Rounds, more: dict[str, Any] | None = None, copies: int = 1) -> Outcome:
    """Return one rival's rounds, measured on ``copies`` copies of the inputs, as the result of its case."""
    result = Result(case, rounds.seconds, more or {}, rounds.error, rounds.clock, copies)
    return Outcome(result, rounds.unavailable)


def interleaved(
    names: Iterable[str], variant: Callable[[str], Variant], rounds: tuple[int, int] | None, **options: Any
) -> dict[str, Rounds]:
    """Time rivals in turns with the clock and budget of this device.

    Args:
        names: The rivals.
        variant: Makes one of them.
        rounds: As the command line asks for; None: as many as fit the budget, after a warm-up on a GPU.
        options: Options of :func:`benchmarks.timing.interleaved` that differ.
    """
    defaults = {"stopwatch": None, "budget": timing.BUDGET[DEVICE], "rounds": rounds or timing.ROUNDS}
    defaults["warm_seconds"] = 0.3 if DEVICE == "cuda" and rounds is None else 0.0
    options = defaults | options
    options["stopwatch"] = options["stopwatch"] or timing.device_clock()
    return timing.interleaved({name: functools.partial(variant, name) for name in names}, **options)


#: Every planned test: chunk -> (group, implementation).
_PLANNED = pytest.StashKey[dict[str, set[tuple[Rivals, str]]]]()


def parametrize(metafunc: pytest.Metafunc, tests: Sequence[tuple[Rivals, str]]) -> None:
    """Make these tests, and record them: a chunk is complete only with all of them, whatever is selected later."""
    if not everything(metafunc.config):
        tests = [(group, name) for group, name in tests if name in STRONGEST]
    found = metafunc.config.stash.setdefault(_PLANNED, {})
    for group, name in tests:
        found.setdefault(group.chunk, set()).add((group, name))
    parameters = [pytest.param(group, name, id=f"{group.label}-{name}") for group, name in tests]
    metafunc.parametrize(("group", "implementation"), parameters)


def planned(config: pytest.Config) -> bool:
    """Return whether the options leave any test of the collected files."""
    return bool(config.stash.get(_PLANNED, {}))


def everything(config: pytest.Config) -> bool:
    """Return whether all rivals are measured without a time limit: for raw results, or if asked for."""
    return config.getoption("--everything") or any(config.getoption(o) is not None for o in ("--results", "--chunk"))


def narrowing(config: pytest.Config) -> dict[str, Any]:
    """Return the options that ask for other cases or rounds than planned, or for a part of the tests (``k``)."""
    asked = {name: config.getoption(f"--{name}") for name in ("images", "rounds", "dtype")}
    if set(asked["dtype"]) == set(chunks.DTYPES):
        del asked["dtype"]
    asked["k"] = config.getoption("keyword") or None
    return {name: value for name, value in asked.items() if value is not None}


@dataclass
class Recorder:
    """Everything measured in a pytest session, each group once.

    Attributes:
        folder: Where the chunks are written after each group, or None.
        command: The command that measures them again.
        planned: Chunk -> tests with which its file is complete; a chunk that is not here is never complete.
        rounds: Least and most rounds of each group, if the command line asks for them.
        minutes: Groups that would end later are left out, and so are rivals of a step that are not made by then.
        narrowing: Which part of a chunk is asked for, for a file's name.
        left_out: The groups that were left out.
    """

    folder: Path | None
    command: str
    planned: dict[str, set[tuple[Rivals, str]]] = field(default_factory=dict)
    rounds: tuple[int, int] | None = None
    minutes: float = math.inf
    narrowing: str = ""
    left_out: set[Rivals] = field(default_factory=set)
    _groups: dict[Rivals, dict[str, Outcome]] = field(default_factory=dict)
    _began: float = field(default_factory=lambda: time.monotonic())
    #: suite -> work and seconds of its last group
    _last: dict[str, tuple[float, float]] = field(default_factory=dict)
    _longest: float = 0.0

    def outcomes(
        self, group: Rivals, names: list[str], measure: Callable[[list[str]], dict[str, Outcome]]
    ) -> dict[str, Outcome]:
        """Return implementation -> outcome, or nothing for a group that is left out.

        ``measure(names)`` is called for a group's first test only. If the group has left the GPU unusable, its
        results are written and the session ends.
        """
        if group in self.left_out or (group not in self._groups and self._late(group)):
            self.left_out.add(group)
            return {}
        if group not in self._groups:
            began = time.monotonic()
            self._groups[group] = measure(names)
            seconds = time.monotonic() - began
            self._last[group.suite] = group.work, seconds
            self._longest = max(self._longest, seconds)
            self._write(group.suite, group.chunk)
            fault = timing.gpu_fault()
            if fault is not None:
                pytest.exit(f"the GPU failed under {group.label}, chunk {group.chunk} ends here: {fault}", returncode=3)
        return self._groups[group]

    def keep(self, group: Rivals, found: dict[str, Outcome]) -> None:
        """Write the results so far of a group that is being measured, in case the session is killed."""
        self._groups[group] = found
        try:
            self._write(group.suite, group.chunk, ended=False)
        finally:
            del self._groups[group]

    @property
    def until(self) -> float:
        """When the minutes are up, on ``time.monotonic``'s clock."""
        return self._began + 60 * self.minutes

    def _late(self, group: Rivals) -> bool:
        """Return whether a group would end too late, by the last group of its suite, or else the longest one."""
        work, seconds = self._last.get(group.suite, (group.work, self._longest))
        spent = time.monotonic() - self._began
        return spent + seconds * max(1.0, group.work / work) > 60 * self.minutes

    def chunks(self) -> list[dict[str, Any]]:
        """Return what was measured, as :func:`benchmarks.groups.groups` takes it."""
        names = dict.fromkeys((group.suite, group.chunk) for group in self._groups)
        return [
            {"suite": suite, "chunk": chunk, "device": results.device_name()}
            | {"results": [result.to_dict() for result in self._kept(chunk)]}
            for suite, chunk in names
        ]

    def _kept(self, chunk: str) -> list[Result]:
        """Return the results of a chunk; a rival that is not here has none."""
        of_chunk = (found for group, found in self._groups.items() if group.chunk == chunk)
        return [outcome.result for found in of_chunk for outcome in found.values() if not outcome.unavailable]

    def _write(self, suite: str, chunk: str, ended: bool = True) -> None:
        if self.folder is None:
            return
        kept = self._kept(chunk)
        tried = {(group, name) for group, found in self._groups.items() if group.chunk == chunk for name in found}
        complete = ended and tried == self.planned.get(chunk)
        rounds = self.rounds or ROUNDS.get(suite, timing.ROUNDS)
        results.write(self.folder, suite, chunk, self.command, kept, complete, rounds, self.narrowing)


def recorder_of(config: pytest.Config) -> Recorder:
    """Return the recorder that the command line asks for."""
    folder = config.getoption("--results")
    if folder is not None and folder.is_file():
        raise pytest.UsageError(f"--results: expected a folder, got the file {folder}")
    command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
    asked = narrowing(config)
    minutes = config.getoption("--minutes")
    if minutes is None:
        minutes = math.inf if everything(config) else SLICE_MINUTES
    count = config.getoption("--rounds")
    return Recorder(
        folder,
        config.getoption("--results-command") or command,
        # a selection by -k shows in the tests that ran; other cases or rounds are never those planned
        planned={} if asked.keys() - {"k"} else config.stash.get(_PLANNED, {}),
        rounds=None if count is None else (count, count),
        minutes=minutes,
        narrowing=re.sub(r"[^A-Za-z0-9]+", "-", " ".join(f"{name} {value}" for name, value in asked.items())).strip(
            "-"
        ),
    )


def selected(session: pytest.Session, group: Rivals) -> list[str]:
    """Return a group's implementations whose tests run, and those that the others are compared with."""
    calls = (getattr(item, "callspec", None) for item in session.items)
    found = (spec.params for spec in calls if spec is not None and spec.params.get("group") == group)
    names = [params["implementation"] for params in found]
    planned = session.config.stash[_PLANNED][group.chunk]
    return [*names, *(name for name in YARDSTICKS if name not in names and (group, name) in planned)]


def play(benchmark: Any, group: Rivals, found: Outcome) -> None:
    """Give a rival's rounds to pytest-benchmark; skip or fail the test if there are none."""
    if found.result.error is not None:
        benchmark.skipped = True  # otherwise pytest-benchmark warns that nothing was timed
        (pytest.skip if found.unavailable else pytest.fail)(found.result.error)
    benchmark.group = group.label
    benchmark.extra_info |= {"device": results.device_name(), "clock": found.result.clock, **found.result.more}
    REPLAY.load(found.result.seconds)
    benchmark.pedantic(lambda: None, rounds=len(found.result.seconds))


def turn_by_turn(measure: Callable[..., dict[str, Outcome]], minutes_each: bool = False) -> Callable[..., None]:
    """Return the test of a suite.

    Args:
        measure: Measures all rivals of a group in turns: (group, rounds, names) -> outcomes.
        minutes_each: A group takes minutes; ``measure`` also gets the recorder, for its clock and to write early.
    """

    @pytest.mark.benchmark(timer=REPLAY)
    def test(
        benchmark: Any,
        request: pytest.FixtureRequest,
        recorder: Recorder,
        group: Rivals,
        implementation: str,
    ) -> None:
        """Test one implementation of a group; the group's first test measures all of them."""
        own = functools.partial(measure, group, recorder.rounds, **({"recorder": recorder} if minutes_each else {}))
        found = recorder.outcomes(group, selected(request.session, group), own)
        if implementation not in found:
            benchmark.skipped = True
            pytest.skip("left out, as the time is up: see --minutes")
        play(benchmark, group, found[implementation])

    return test
