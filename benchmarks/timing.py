"""Seconds of rival calls, taken in turns: CUDA graphs or events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.results import one_line

#: Seconds that the rounds of one group of rivals may take, and between which numbers of rounds that decides.
BUDGET = {"cuda": 2.0, "cpu": 2.0}
ROUNDS = (5, 30)
#: GPU clock cycles of the pause in which work is enqueued: half a millisecond, longer than launching any graph here.
PAUSE = 1_000_000
MOST_COPIES = 64

Turn = Callable[[], float]


class Unavailable(Exception):
    """What would be measured is not here, or not for this device; the message says why."""


@dataclass(frozen=True)
class Call:
    """What is timed, and what comes before it untimed, such as the forward whose graph a backward uses up."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Variant:
    """One rival.

    Attributes:
        calls: the same work on one or more copies of the inputs, taken in turn.
        context: is in force around them, as ``use_backend``; entering it is not timed.
    """

    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Rounds:
    """Seconds of one call in each round, or why there are none.

    ``clock``: "CUDA graph", "CUDA events" or "wall clock". ``unavailable``: the error is only that it is not here.
    """

    seconds: list[float] = field(default_factory=list)
    clock: str | None = None
    error: str | None = None
    unavailable: bool = False


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any]) -> float:
    """Of one call, the GPU's work included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def copies(bytes_each: int, l2_bytes: int) -> int:
    """How many copies of the inputs to take in turn, so that each finds the L2 cache filled with others.

    Args:
        bytes_each: of the tensors that one call reads. l2_bytes: size of the cache; 0 asks for one copy.
    """
    return min(max(1, math.ceil(2 * l2_bytes / max(bytes_each, 1))), MOST_COPIES)


def l2_bytes() -> int:
    """Of the first GPU; 0 without one, as a CPU's calls are timed on one copy."""
    return torch.cuda.get_device_properties(0).L2_cache_size if torch.cuda.is_available() else 0


def rounds_within(budget: float, turn: float, rounds: tuple[int, int] = ROUNDS) -> int:
    """As many rounds of ``turn`` seconds as the budget has room for, between the two given."""
    least, most = rounds
    return max(least, min(most, int(budget / max(turn, 1e-9))))


def interleaved(
    variants: Mapping[str, Callable[[], Variant]],
    stopwatch: Callable[[Variant], tuple[Turn, str]],
    budget: float,
    rounds: tuple[int, int] = ROUNDS,
    warm_seconds: float = 0.0,
) -> dict[str, Rounds]:
    """Time rivals in turns: what else the machine does, and its clock, then hit all of them alike.

    Args:
        variants: name -> what makes the rival. One that fails, here or later, is out, with its reason;
            the others go on.
        stopwatch: makes of a rival a function that does one turn and returns its seconds, and the clock's name.
        budget: seconds for all rounds together, within ``rounds``, (least, most).
        warm_seconds: for how long all take turns before it counts; once each at least.
    """
    found = {name: Rounds() for name in variants}
    turns: dict[str, Turn] = {}

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # whatever a rival raises is its result
            found[name].error = one_line(error)
            found[name].unavailable = isinstance(error, Unavailable)
            found[name].seconds.clear()
            turns.pop(name, None)
        # after the handler, or the traceback would hold the rival's tensors
        _release()
        return None

    for name, make in variants.items():
        made = attempt(name, lambda make=make: stopwatch(make()))  # type: ignore[misc]
        if made is not None:
            turns[name], found[name].clock = made
    with _no_collection():
        started = time.perf_counter()
        while turns:
            begun = time.perf_counter()
            for name, turn in list(turns.items()):
                attempt(name, turn)
            if time.perf_counter() - started >= warm_seconds:
                break
        spent = time.perf_counter() - begun if turns else 0.0
        for number in range(rounds_within(budget, spent, rounds)):
            order = list(turns)
            # nobody always comes after the same one
            first = number % max(len(order), 1)
            for name in order[first:] + order[:first]:
                took = attempt(name, turns[name])
                if took is not None:
                    found[name].seconds.append(took)
    return found


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wall_clock(variant: Variant) -> tuple[Turn, str]:
    """A stopwatch for the CPU: one call a turn."""
    upcoming = itertools.cycle(variant.calls)

    def turn() -> float:
        call = next(upcoming)
        with variant.context():
            if call.before is not None:
                call.before()
            start = time.perf_counter()
            result = call.run()
            spent = time.perf_counter() - start
        del result  # not timed: its memory goes back to the system here
        return spent

    return turn, "wall clock"


def batches(count: int, wait: bool) -> Callable[[Variant], tuple[Turn, str]]:
    """A stopwatch that looks at the wall clock after ``count`` rounds of a rival's calls.

    Args:
        wait: on a GPU wait for its work within the time; otherwise the time is what enqueueing costs the CPU.
    """

    def make(variant: Variant) -> tuple[Turn, str]:
        def turn() -> float:
            with variant.context():
                synchronize()
                start = time.perf_counter()
                for _ in range(count):
                    for call in variant.calls:
                        call.run()
                if wait:
                    synchronize()
                spent = time.perf_counter() - start
            synchronize()
            return spent / (count * len(variant.calls))

        return turn, "wall clock"

    return make


class GraphClock:
    """A stopwatch for a GPU: all copies' calls in one CUDA graph, or enqueued one by one if they cannot be captured.

    The graphs of a group share their memory: each writes what it reads, so any order of replays is right.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, variant: Variant) -> tuple[Turn, str]:
        synchronize()  # the inputs were made on another stream
        calls = variant.calls
        before = [call.before for call in calls if call.before is not None]
        run = [call.run for call in calls]
        with variant.context(), torch.cuda.stream(self.stream):
            for _ in range(3):  # compiles, loads libraries, fills caches
                _each(before)
                _each(run)
        torch.cuda.synchronize()
        try:
            prepare, work = (self._capture(actions, variant) for actions in (before, run))
            clock = "CUDA graph"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            warnings.warn(f"not captured, timed call by call: {one_line(error)}", stacklevel=2)
            prepare, work = (lambda: _each(before)), (lambda: _each(run))
            clock = "CUDA events"
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def turn() -> float:
            with variant.context(), torch.cuda.stream(self.stream):
                prepare()
                # the GPU waits while the work is enqueued, so that it never waits for the CPU afterwards
                torch.cuda._sleep(PAUSE if clock == "CUDA graph" else 20 * PAUSE)
                start.record()
                work()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / len(calls)

        return turn, clock

    def _capture(self, actions: Sequence[Callable[[], Any]], variant: Variant) -> Callable[[], None]:
        if not actions:
            return lambda: None
        graph = torch.cuda.CUDAGraph()
        with variant.context(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            _each(actions)
        return graph.replay


def _each(actions: Sequence[Callable[[], Any]]) -> None:
    for action in actions:
        action()


def device_clock() -> Callable[[Variant], tuple[Turn, str]]:
    """The stopwatch of this machine for one group of rivals."""
    return GraphClock() if torch.cuda.is_available() else wall_clock
