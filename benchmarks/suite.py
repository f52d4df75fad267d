"""What the suites share: groups of rivals measured in turns, handed to pytest-benchmark and written to files."""

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

from benchmarks import cases, results, timing
from benchmarks.results import Result
from benchmarks.timing import Rounds


class ReplayTimer:
    """A timer for pytest-benchmark that tells durations measured before, each between two calls.

    Rivals are timed in turns, all of a group together, while pytest-benchmark times one test
    after another: its table and JSON get the interleaved times by this.
    """

    __name__ = "replay"

    def __init__(self) -> None:
        self._now = 0.0
        self._steps: list[float] = []

    def load(self, seconds: Iterable[float]) -> None:
        """The durations to tell next, in order."""
        self._now = 0.0
        self._steps = [step for duration in seconds for step in (0.0, duration)][::-1]

    def __call__(self) -> float:
        if not self._steps:
            raise RuntimeError("replay: asked for more durations than were measured")
        self._now += self._steps.pop()
        return self._now


REPLAY = ReplayTimer()

#: Least and most rounds of a group of a suite, where they are not :data:`~benchmarks.timing.ROUNDS`.
ROUNDS = {"launch": (10, 200)}

#: A session that does not measure everything begins no group that would end later, and leaves out all but these rivals.
SLICE_MINUTES = 7.0

STRONGEST = frozenset(
    (
        *(results.OURS, results.FORMULA, results.FORMULA_COMPILED, results.RECOMPUTE, results.RECOMPUTE_COMPILED),
        *(results.PLAIN, results.PRODUCTS, results.COMPOSED, results.LAYER_NORM),
        *(results.OFFICIAL, results.OFFICIAL_COMPILED, results.PROBE),
    )
)

#: Ours, the formula of each suite, and what costs little and shows the scale.
YARDSTICKS = (results.OURS, results.GRAD_SCALES, results.FORMULA, results.OFFICIAL, results.PLAIN, results.BARE_GRAD)


@dataclass(frozen=True)
class Rivals:
    """A group: everything of a test's parameters but the implementation.

    Attributes:
        suite, chunk: where its results go.
        key: what tells it from other groups of the suite. label: heads pytest-benchmark's table.
        place: groups of a lower one are measured first, as the clock may leave out the last.
        work: of a call, beside those of other groups of the suite.
    """

    suite: str
    chunk: str
    key: tuple[Any, ...]
    label: str
    place: int = 0
    work: float = 1.0


@dataclass
class Outcome:
    """A result, and whether its error is only that it is not here, which is not part of its file."""

    result: Result
    unavailable: bool = False


def outcome(case: results.Case, rounds: Rounds, more: dict[str, Any], copies: int = 1) -> Outcome:
    """One rival's rounds, measured on ``copies`` copies of the inputs, as the result of its case."""
    result = Result(case, rounds.seconds, more, rounds.error, rounds.clock, copies)
    return Outcome(result, rounds.unavailable)


#: Every test of the suites as they are planned: chunk -> (group, implementation).
_PLANNED = pytest.StashKey[dict[str, set[tuple[Rivals, str]]]]()


def parametrize(metafunc: pytest.Metafunc, tests: Sequence[tuple[Rivals, str]]) -> None:
    """Make these tests, and note that a chunk is complete with all that it has here, whatever is selected later."""
    if not everything(metafunc.config):
        tests = [(group, name) for group, name in tests if name in STRONGEST]
    found = metafunc.config.stash.setdefault(_PLANNED, {})
    for group, name in tests:
        found.setdefault(group.chunk, set()).add((group, name))
    parameters = [pytest.param(group, name, id=f"{group.label}-{name}") for group, name in tests]
    metafunc.parametrize(("group", "implementation"), parameters)


def planned(config: pytest.Config) -> bool:
    """Whether the options leave any test of the files that were collected."""
    return bool(config.stash.get(_PLANNED, {}))


def everything(config: pytest.Config) -> bool:
    """Whether all rivals are measured, however long it takes: for raw results, and where asked for."""
    return config.getoption("--everything") or any(config.getoption(o) is not None for o in ("--results", "--chunk"))


def narrowed(config: pytest.Config) -> bool:
    """Whether options ask for other cases or rounds than planned."""
    asked = (config.getoption(name) for name in ("--images", "--rounds"))
    return any(o is not None for o in asked) or set(config.getoption("--dtype")) != set(cases.DTYPES)


def narrowing(config: pytest.Config) -> str:
    """What else than all of a chunk is asked for, for a file's name: ``images-64-k-not-autotune``; empty for all."""
    asked = {name: config.getoption(f"--{name}") for name in ("images", "rounds")}
    asked["dtype"] = None if set(config.getoption("--dtype")) == set(cases.DTYPES) else config.getoption("--dtype")
    asked["k"] = config.getoption("keyword") or None
    words = (f"{name} {value}" for name, value in asked.items() if value is not None)
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words)).strip("-")


@dataclass
class Recorder:
    """Everything measured in a pytest session, each group once.

    Attributes:
        folder: where the chunks are written after each group, or None. command: what regenerates them.
        planned: chunk -> tests with which its file is complete; a chunk that is not here is never complete.
        rounds: least and most of each group, where the command line asks for them.
        minutes: groups that would not end within these are left out, and so are rivals of a step that are not made
            yet when they are up.
        narrowing: what else than all of a chunk is asked for, as a part of a file's name.
        left_out: those groups.
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
        """Implementation -> outcome, none of a group left out; ``measure(names)`` is called for its first test only.

        Ends the session where the group has left the GPU unusable: what it measured is written.
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
        """Write what there is of a group that is being measured: it is all that is left if the session is killed."""
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
        """Whether it would end too late, by what the last group of its suite, or else the longest, took."""
        work, seconds = self._last.get(group.suite, (group.work, self._longest))
        spent = time.monotonic() - self._began
        return spent + seconds * max(1.0, group.work / work) > 60 * self.minutes

    def chunks(self) -> list[dict[str, Any]]:
        """What was measured, as :func:`benchmarks.groups.groups` takes it."""
        names = dict.fromkeys((group.suite, group.chunk) for group in self._groups)
        return [
            {"suite": suite, "chunk": chunk, "device": results.device_name()}
            | {"results": [result.to_dict() for result in self._kept(chunk)]}
            for suite, chunk in names
        ]

    def _kept(self, chunk: str) -> list[Result]:
        """What is not here has no result, not a failed one."""
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
    """A recorder as the command line asks for."""
    folder = config.getoption("--results")
    if folder is not None and folder.is_file():
        raise pytest.UsageError(f"--results: expected a folder, got the file {folder}")
    command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
    planned = {} if narrowed(config) else config.stash.get(_PLANNED, {})
    command = config.getoption("--results-command") or command
    minutes = config.getoption("--minutes")
    if minutes is None:
        minutes = math.inf if everything(config) else SLICE_MINUTES
    count = config.getoption("--rounds")
    rounds = None if count is None else (count, count)
    return Recorder(folder, command, planned, rounds, minutes, narrowing(config))


def selected(session: pytest.Session, group: Rivals) -> list[str]:
    """Implementations of a group whose tests run, and after them those without which the others' times say nothing."""
    calls = (getattr(item, "callspec", None) for item in session.items)
    found = (spec.params for spec in calls if spec is not None and spec.params.get("group") == group)
    names = [params["implementation"] for params in found]
    planned = session.config.stash[_PLANNED][group.chunk]
    return [*names, *(name for name in YARDSTICKS if name not in names and (group, name) in planned)]


def play(benchmark: Any, group: Rivals, found: Outcome) -> None:
    """Hand a rival's rounds to pytest-benchmark; skips or fails the test where there are none."""
    if found.result.error is not None:
        benchmark.skipped = True  # or it would complain that nothing was timed
        (pytest.skip if found.unavailable else pytest.fail)(found.result.error)
    benchmark.group = group.label
    benchmark.extra_info |= {"device": results.device_name(), "clock": found.result.clock, **found.result.more}
    REPLAY.load(found.result.seconds)
    benchmark.pedantic(lambda: None, rounds=len(found.result.seconds))


def turn_by_turn(measure: Callable[..., dict[str, Outcome]], minutes_each: bool = False) -> Callable[..., None]:
    """The test of a suite: ``measure`` (of a group, rounds, names) lets all rivals of a group take turns, once.

    ``minutes_each``: a group takes minutes; ``measure`` has the recorder too, for its clock and to keep results early.
    """

    @pytest.mark.benchmark(timer=REPLAY)
    def test(
        benchmark: Any,
        request: pytest.FixtureRequest,
        recorder: Recorder,
        group: Rivals,
        implementation: str,
    ) -> None:
        """One implementation of a group; the group's first test measures all of them."""
        own = functools.partial(measure, group, recorder.rounds, **({"recorder": recorder} if minutes_each else {}))
        found = recorder.outcomes(group, selected(request.session, group), own)
        if implementation not in found:
            benchmark.skipped = True
            pytest.skip("left out, as the time is up: see --minutes")
        play(benchmark, group, found[implementation])

    return test
