"""What the suites share: groups of rivals measured in turns, handed to pytest-benchmark and written to files."""

from __future__ import annotations

import functools
import shlex
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
ROUNDS = {"launch": (50, 200)}


@dataclass(frozen=True)
class Rivals:
    """A group: everything of a test's parameters but the implementation.

    Attributes:
        suite, chunk: where its results go.
        key: what tells it from other groups of the suite. label: heads pytest-benchmark's table.
    """

    suite: str
    chunk: str
    key: tuple[Any, ...]
    label: str


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
    planned = metafunc.config.stash.setdefault(_PLANNED, {})
    for group, name in tests:
        planned.setdefault(group.chunk, set()).add((group, name))
    parameters = [pytest.param(group, name, id=f"{group.label}-{name}") for group, name in tests]
    metafunc.parametrize(("group", "implementation"), parameters)


def narrowed(config: pytest.Config) -> bool:
    """Whether options ask for other cases or rounds than planned."""
    asked = (config.getoption(name) for name in ("--images", "--rounds"))
    disabled = config.getoption("--benchmark-disable") and not config.getoption("--benchmark-enable")
    return disabled or any(o is not None for o in asked) or set(config.getoption("--dtype")) != set(cases.DTYPES)


@dataclass
class Recorder:
    """Everything measured in a pytest session, each group once.

    Attributes:
        folder: where the chunks are written after each group, or None. command: what regenerates them.
        planned: chunk -> tests with which its file is complete; a chunk that is not here is never complete.
        rounds: least and most of each group, where the command line asks for them.
    """

    folder: Path | None
    command: str
    planned: dict[str, set[tuple[Rivals, str]]] = field(default_factory=dict)
    rounds: tuple[int, int] | None = None
    _groups: dict[Rivals, dict[str, Outcome]] = field(default_factory=dict)

    def outcomes(
        self, group: Rivals, names: list[str], measure: Callable[[list[str]], dict[str, Outcome]]
    ) -> dict[str, Outcome]:
        """Implementation -> outcome; ``measure(names)`` is called for a group's first test only.

        Ends the session where the group has left the GPU unusable: what it measured is written.
        """
        if group not in self._groups:
            self._groups[group] = measure(names)
            self._write(group.suite, group.chunk)
            fault = timing.gpu_fault()
            if fault is not None:
                pytest.exit(f"the GPU failed under {group.label}, chunk {group.chunk} ends here: {fault}", returncode=3)
        return self._groups[group]

    def _write(self, suite: str, chunk: str) -> None:
        if self.folder is None:
            return
        of_chunk = {
            group: found for group, found in self._groups.items() if (group.suite, group.chunk) == (suite, chunk)
        }
        # what is not here has no result, not a failed one
        kept = [o.result for found in of_chunk.values() for o in found.values() if not o.unavailable]
        tried = {(group, name) for group, found in of_chunk.items() for name in found}
        complete = tried == self.planned.get(chunk)
        rounds = self.rounds or ROUNDS.get(suite, timing.ROUNDS)
        results.write(self.folder, suite, chunk, self.command, kept, complete, rounds)


def recorder_of(config: pytest.Config) -> Recorder:
    """A recorder as the command line asks for."""
    folder = config.getoption("--results")
    if folder is not None and folder.is_file():
        raise pytest.UsageError(f"--results: expected a folder, got the file {folder}")
    command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
    planned = {} if narrowed(config) else config.stash.get(_PLANNED, {})
    command = config.getoption("--results-command") or command
    return Recorder(folder, command, planned, rounds_of(config))


def rounds_of(config: pytest.Config) -> tuple[int, int] | None:
    """(least, most) rounds that the command line asks for."""
    asked = config.getoption("--rounds")
    if config.getoption("--benchmark-disable") and not config.getoption("--benchmark-enable"):
        asked = asked or 1  # a run that only shows that everything works
    return None if asked is None else (asked, asked)


def selected(request: pytest.FixtureRequest, group: Rivals) -> list[str]:
    """Implementations of a group whose tests run in this session."""
    calls = (getattr(item, "callspec", None) for item in request.session.items)
    found = (spec.params for spec in calls if spec is not None and spec.params.get("group") == group)
    return [params["implementation"] for params in found]


def play(benchmark: Any, group: Rivals, found: Outcome) -> None:
    """Hand a rival's rounds to pytest-benchmark; skips or fails the test where there are none."""
    if found.result.error is not None:
        benchmark.skipped = True  # or it would complain that nothing was timed
        (pytest.skip if found.unavailable else pytest.fail)(found.result.error)
    benchmark.group = group.label
    benchmark.extra_info |= {"device": results.device_name(), "clock": found.result.clock, **found.result.more}
    REPLAY.load(found.result.seconds)
    benchmark.pedantic(lambda: None, rounds=len(found.result.seconds))


def turn_by_turn(
    measure: Callable[[Rivals, tuple[int, int] | None, list[str]], dict[str, Outcome]],
) -> Callable[..., None]:
    """The test of a suite: ``measure`` (of a group, rounds, names) lets all rivals of a group take turns, once."""

    @pytest.mark.benchmark(timer=REPLAY)
    def test(
        benchmark: Any,
        request: pytest.FixtureRequest,
        recorder: Recorder,
        rounds: tuple[int, int] | None,
        group: Rivals,
        implementation: str,
    ) -> None:
        """One implementation of a group; the group's first test measures all of them."""
        own = functools.partial(measure, group, rounds)
        play(benchmark, group, recorder.outcomes(group, selected(request, group), own)[implementation])

    return test
