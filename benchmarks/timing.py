"""Seconds of rival calls, which take turns: by CUDA graphs or events on a GPU, by the wall clock on a CPU."""

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

from benchmarks.results import EVENTS, GRAPH, WALL
from rlrr_kernels.io.checks import error_line

#: Seconds that the rounds of one group of rivals may take, and between which numbers of rounds that decides.
BUDGET = {"cuda": 2.0, "cpu": 1.5}
ROUNDS = (5, 30)
#: GPU clock cycles of the pause in which work is enqueued: half a millisecond, more than any graph takes to launch.
PAUSE = 1_000_000
MOST_COPIES = 64

Turn = Callable[[], float]


class Unavailable(Exception):
    """A rival is not here, or not for this device; the message says why."""


class Rejected(Exception):
    """A rival must not be timed, as its results are wrong; the message says how."""


@dataclass(frozen=True)
class Call:
    """What is timed, and what runs untimed before it, such as the forward whose graph a backward uses up."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Variant:
    """One rival.

    Attributes:
        calls: The same work on one or more copies of the inputs, used in turn.
        context: Is active around the calls, as ``use_backend``; entering it is not timed.
    """

    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Rounds:
    """Seconds of one call in each round, or why there are none.

    Attributes:
        clock: "graph" (a CUDA graph's replay), "events" (CUDA events around single calls) or "wall".
        unavailable: The error is only that the rival is not here.
    """

    seconds: list[float] = field(default_factory=list)
    clock: str | None = None
    error: str | None = None
    unavailable: bool = False


class Stopwatch(Protocol):
    """Makes of a rival a function that takes one turn and returns its seconds."""

    def __call__(self, variant: Variant) -> Turn:
        """Return the function; it has run once, so that compiling is not timed."""

    @property
    def clock(self) -> str:
        """The clock of all rivals; it is known once they are all made."""


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copies(bytes_each: int, l2_bytes: int) -> int:
    """Return how many copies of the inputs to use in turn, so that none is in the L2 cache at its turn.

    Args:
        bytes_each: Bytes of the tensors that one call reads.
        l2_bytes: Size of the cache; 0 gives one copy.
    """
    return min(max(1, math.ceil(2 * l2_bytes / max(bytes_each, 1))), MOST_COPIES)


def l2_bytes() -> int:
    """Return the L2 cache size of the first GPU; 0 without one, as a CPU's calls are timed on one copy."""
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
    """Time rivals in turns, so that other work of the machine, and its clock, affect all of them alike.

    Each round has its own order, drawn from a fixed seed. After a fault that leaves the GPU unusable nothing more runs,
    and what was measured before is kept.

    Args:
        variants: Name -> function that makes the rival. A rival that fails, here or later, is out, and its error is
            kept; the others go on.
        stopwatch: Times all of them.
        budget: Seconds after which no further round begins.
        rounds: The least and the most rounds, whatever the budget.
        warm_seconds: How long all take turns before it counts; at least once each.
        until: Time of ``time.monotonic`` after which no further rival is made, and no round but the first begins;
            rivals that were not made have neither seconds nor an error.
        after_each: Is called, untimed, with the results after each round, and after a rival could not be made.
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
            found[name].error = str(error) if isinstance(error, Rejected) else error_line(error)
            found[name].unavailable = isinstance(error, Unavailable)
            found[name].seconds.clear()
            turns.pop(name, None)
        # after the handler: within it the traceback holds the rival's tensors
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
            # the number of rounds is not computed from the first: on a busy machine some take ten times as long
            if count >= least and time.perf_counter() - started >= budget:
                break
            if count and time.monotonic() > until:
                break
            order = list(turns)
            shuffle(order)  # so that no rival always follows the same one
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
    """Return why the GPU takes no more work in this process, as after an illegal access, or None."""
    try:
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except RuntimeError as error:
        return error_line(error)
    return None


def _release() -> str | None:
    """Free a failed rival's memory, and return the GPU's fault, if any."""
    gc.collect()
    return gpu_fault()


class WallClock:
    """A stopwatch for the CPU: one call is a turn."""

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
    """A stopwatch that reads the wall clock after ``count`` rounds of a rival's calls.

    Attributes:
        wait: Wait for a GPU's work within the time; otherwise the time is what enqueueing costs the CPU.
        settle: On a GPU, empty the allocator's cache and call once, untimed, at the start of each turn, as the rival
            before has left blocks of other sizes.
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
    """A stopwatch for a GPU: all copies' calls in one CUDA graph, or between two events if graphs fail.

    The graphs of a group share their memory: each writes what it reads, so they can be replayed in any order. If one
    rival cannot be captured, all are enqueued call by call: a group has one clock.
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
            # read at each turn: a later rival may have failed to be captured
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
        """Return both as graphs, or None if they cannot be captured."""
        try:
            return self._capture(before, variant), self._capture(run, variant)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises if the GPU is broken: that is this rival's error
            self.captures = False
            warnings.warn(f"not captured, so its whole group is timed by events: {error_line(error)}", stacklevel=2)
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
            # a failed capture leaves its stream current and its pool unusable
            torch.cuda.set_stream(current)
            self.pool = torch.cuda.graph_pool_handle()
            raise
        return graph.replay


def _each(actions: Sequence[Callable[[], Any]]) -> None:
    for action in actions:
        action()


def device_clock() -> Stopwatch:
    """Return the stopwatch of this machine for one group of rivals."""
    return GraphClock() if torch.cuda.is_available() else WallClock()
