"""Seconds of rival calls, taken in turns: CUDA graphs or events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from benchmarks.results import EVENTS, GRAPH, WALL, one_line

#: Seconds that the rounds of one group of rivals may take, and between which numbers of rounds that decides.
BUDGET = {"cuda": 2.0, "cpu": 1.5}
ROUNDS = (5, 30)
#: GPU clock cycles of the pause in which work is enqueued: half a millisecond, longer than launching any graph here.
PAUSE = 1_000_000
MOST_COPIES = 64

Turn = Callable[[], float]


class Unavailable(Exception):
    """What would be measured is not here, or not for this device; the message says why."""


class Rejected(Exception):
    """What is here but must not be timed, as its results are wrong; the message says all of it."""


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

    ``clock``: "graph" (a CUDA graph's replay), "events" (CUDA events around single calls) or "wall".
    ``unavailable``: the error is only that it is not here.
    """

    seconds: list[float] = field(default_factory=list)
    clock: str | None = None
    error: str | None = None
    unavailable: bool = False


class Stopwatch(Protocol):
    """Makes of a rival a function that does one turn and returns its seconds."""

    def __call__(self, variant: Variant) -> Turn:
        """The function; what it times was run before."""

    @property
    def clock(self) -> str:
        """What reads the time of all rivals that it was given, known once they are all made."""


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


def interleaved(
    variants: Mapping[str, Callable[[], Variant]],
    stopwatch: Stopwatch,
    budget: float,
    rounds: tuple[int, int] = ROUNDS,
    warm_seconds: float = 0.0,
    until: float = math.inf,
    after_each: Callable[[dict[str, Rounds]], Any] = lambda found: None,
) -> dict[str, Rounds]:
    """Time rivals in turns: what else the machine does, and its clock, then hit all of them alike.

    Each round has an order of its own, drawn at random from a fixed seed. After a fault that leaves the GPU
    unusable nothing more runs, and what was measured before it is kept.

    Args:
        variants: name -> what makes the rival. One that fails, here or later, is out, with its reason;
            the others go on.
        stopwatch: of all of them.
        budget: seconds after which no further round begins, within ``rounds``, (least, most).
        warm_seconds: for how long all take turns before it counts; once each at least.
        until: a time of ``time.monotonic`` after which no rival is made any more and no round begins but the first;
            those not made have neither seconds nor an error.
        after_each: called, untimed, with what was found when a rival could not be made and after each round.
    """
    found = {name: Rounds() for name in variants}
    turns: dict[str, Turn] = {}
    fault: str | None = None

    def attempt(name: str, action: Callable[[], Any]) -> Any:
        nonlocal fault
        if fault is not None:
            return None
        try:
            return action()
        except Exception as error:  # whatever a rival raises is its result
            found[name].error = str(error) if isinstance(error, Rejected) else one_line(error)
            found[name].unavailable = isinstance(error, Unavailable)
            found[name].seconds.clear()
            turns.pop(name, None)
        # after the handler, or the traceback would hold the rival's tensors
        fault = _release()
        if fault is not None:
            fault = f"not measured: the GPU failed under {name}: {fault}"
        return None

    for name, make in variants.items():
        if turns and time.monotonic() > until:
            break
        made = attempt(name, lambda make=make: stopwatch(make()))  # type: ignore[misc]
        if made is not None:
            turns[name] = made
        elif found[name].error is not None:
            after_each(found)
    shuffle = random.Random(0).shuffle
    with _no_collection():
        started = time.perf_counter()
        while turns and fault is None:
            for name, turn in list(turns.items()):
                attempt(name, turn)
            if time.perf_counter() - started >= warm_seconds:
                break
        least, most = rounds
        started = time.perf_counter()
        for count in range(most):
            # not foretold from one round: on a busy machine some take ten times as long as others
            if count >= least and time.perf_counter() - started >= budget:
                break
            if count and time.monotonic() > until:
                break
            order = list(turns)
            shuffle(order)  # nobody always comes after the same one
            for name in order:
                took = attempt(name, turns[name])
                if took is not None:
                    found[name].seconds.append(took)
                    found[name].clock = stopwatch.clock
            after_each(found)
    for rival in found.values():
        rival.clock = stopwatch.clock if rival.seconds else None
        if rival.error is None and not rival.seconds:
            rival.error = fault
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


def gpu_fault() -> str | None:
    """Why the GPU takes no more work in this process, as after an illegal access; None while it does."""
    try:
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except RuntimeError as error:
        return one_line(error)
    return None


def _release() -> str | None:
    """Give back a failed rival's memory; the GPU's fault, if it has one."""
    gc.collect()
    return gpu_fault()


class WallClock:
    """A stopwatch for the CPU: one call a turn."""

    clock = WALL

    def __call__(self, variant: Variant) -> Turn:
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

        return turn


@dataclass(frozen=True)
class Batches:
    """A stopwatch that looks at the wall clock after ``count`` rounds of a rival's calls.

    Attributes:
        wait: on a GPU wait for its work within the time; otherwise the time is what enqueueing costs the CPU.
        settle: on a GPU empty the allocator's cache and call once, untimed, at the start of each turn: the
            blocks that the rival before has left are of other sizes.
    """

    count: int
    wait: bool
    settle: bool = False

    @property
    def clock(self) -> str:
        return WALL

    def __call__(self, variant: Variant) -> Turn:
        def once() -> None:
            for call in variant.calls:
                call.run()

        def turn() -> float:
            with variant.context():
                if self.settle and torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    once()
                synchronize()
                start = time.perf_counter()
                for _ in range(self.count):
                    once()
                if self.wait:
                    synchronize()
                spent = time.perf_counter() - start
            synchronize()
            return spent / (self.count * len(variant.calls))

        return turn


class GraphClock:
    """A stopwatch for a GPU: all copies' calls in one CUDA graph, or between two events where graphs fail.

    The graphs of a group share their memory: each writes what it reads, so any order of replays is right.
    Where one rival cannot be captured, all are enqueued call by call: a group has one clock.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.captures = True

    @property
    def clock(self) -> str:
        return GRAPH if self.captures else EVENTS

    def __call__(self, variant: Variant) -> Turn:
        synchronize()  # the inputs were made on another stream
        calls = variant.calls
        before = [call.before for call in calls if call.before is not None]
        run = [call.run for call in calls]
        with variant.context(), torch.cuda.stream(self.stream):
            for _ in range(3):  # compiles, loads libraries, fills caches
                _each(before)
                _each(run)
        torch.cuda.synchronize()
        enqueued = functools.partial(_each, before), functools.partial(_each, run)
        captured = self._captured(before, run, variant) if self.captures else None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def turn() -> float:
            # asked at each turn: a rival made later may not have been captured
            prepare, work = captured if captured is not None and self.captures else enqueued
            with variant.context(), torch.cuda.stream(self.stream):
                prepare()
                # the GPU waits while the work is enqueued, so that it never waits for the CPU afterwards
                torch.cuda._sleep(PAUSE if self.captures else 20 * PAUSE)
                start.record()
                work()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / len(calls)

        return turn

    def _captured(
        self, before: Sequence[Callable[[], Any]], run: Sequence[Callable[[], Any]], variant: Variant
    ) -> tuple[Callable[[], None], Callable[[], None]] | None:
        """Both as graphs, or None where they cannot be captured."""
        try:
            return self._capture(before, variant), self._capture(run, variant)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()  # what broke the GPU is this rival's error, and no refusal
            self.captures = False
            warnings.warn(f"not captured, so its whole group is timed by events: {one_line(error)}", stacklevel=2)
            return None

    def _capture(self, actions: Sequence[Callable[[], Any]], variant: Variant) -> Callable[[], None]:
        if not actions:
            return lambda: None
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        try:
            with variant.context(), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                _each(actions)
        except BaseException:
            # a failed capture leaves its stream current, and its pool between two states
            torch.cuda.set_stream(current)
            self.pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay


def _each(actions: Sequence[Callable[[], Any]]) -> None:
    for action in actions:
        action()


def device_clock() -> Stopwatch:
    """The stopwatch of this machine for one group of rivals."""
    return GraphClock() if torch.cuda.is_available() else WallClock()
