"""A model of one Hopper multiprocessor, as seen from Gluon: shared memory, asynchronous operations, mbarriers, warps.

Asynchronous operations complete as late as a wait allows. From its issue to its completion an operation holds its
shared memory: a copy has poisoned what it will write, and a product or a store has yet to read. It is an error to
access held memory in a way that could give other results on hardware, to arm a barrier twice, to end with an operation
in flight, and to deadlock. Partitions are threads, of which one runs at a time; they take turns at every synchronising
call, in the order of a :class:`Schedule`.

The model does not cover timing, registers, races of ordinary loads and stores within one partition, and memory
ordering other than a missing fence before the copy engine or ``wgmma`` reads.
"""

from __future__ import annotations

import dis
import math
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor


class MachineError(Exception):
    """Raised where hardware would hang or return wrong results."""


class _Ended(BaseException):
    """Unwinds the partitions of a program after another one has failed."""


@dataclass(frozen=True)
class Schedule:
    """Which partition runs next if several could.

    Attributes:
        order: "first" (partitions in their order, consumers before the producer), "last" (the producer first),
            "turns", or "random" (copies then may also land before they are needed).
        seed: Of the random order.
        backwards: Whether programs run from the last to the first.
    """

    order: str = "first"
    seed: int = 0
    backwards: bool = False


@dataclass(eq=False)
class Operation:
    """An operation in flight over ``views``: a "copy", "product", "store", or ordinary "write" before its fence."""

    kind: str
    what: str
    views: tuple[View, ...]
    finish: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        for view in self.views:
            view.memory.held.append((view, self))

    def end(self) -> None:
        for view in self.views:
            view.memory.held.remove((view, self))
        self.finish()


@dataclass(eq=False)
class Barrier:
    """An mbarrier. ``phase`` counts completed phases; the current one awaits ``arrivals`` and ``bytes``."""

    name: str
    count: int

    def __post_init__(self) -> None:
        self.phase, self.arrivals, self.bytes = 0, self.count, 0

    def __str__(self) -> str:
        return f"{self.name} (phase {self.phase}, awaits {self.arrivals} of {self.count} arrivals, {self.bytes} bytes)"

    def arrive(self, count: int, expected: int = 0) -> None:
        if count > self.arrivals:
            raise MachineError(f"{current().name}: {count} arrivals at {self}")
        self.arrivals -= count
        self.bytes += expected
        self._settle()

    def land(self, size: int) -> None:
        """Count bytes that have landed: before or after they are expected, but not in a phase that expects none."""
        self.bytes -= size
        if self.bytes < 0 and self.arrivals == 0:
            raise MachineError(f"{size} bytes too many at {self}")
        self._settle()

    def _settle(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.phase, self.arrivals = self.phase + 1, self.count


def poison(data: Tensor) -> None:
    data.fill_(math.nan if data.is_floating_point() else -1)


@dataclass(eq=False)
class Memory:
    """One allocation of shared memory; ``held`` lists the parts that operations in flight hold."""

    name: str
    dtype: Any
    layout: Any
    held: list[tuple[View, Operation]] = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)


@dataclass(eq=False)
class View:
    """A part of an allocation: its elements, and the box ``[first, end)`` of the allocation that they fill.

    ``dims`` maps the view's dimensions to the allocation's.
    """

    memory: Memory
    data: Tensor
    box: tuple[tuple[int, int], ...]
    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.memory.name}[{', '.join(f'{first}:{end}' for first, end in self.box)}]"

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return self.memory.dtype

    @property
    def layout(self) -> Any:
        return self.memory.layout

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def slice(self, start: int, length: int, dim: int = 0) -> View:
        if start < 0 or start + length > self.data.shape[dim]:
            raise MachineError(f"{current().name}: {start} to {start + length} in dimension {dim} of {self}")
        box, of = list(self.box), self.dims[dim]
        box[of] = box[of][0] + start, box[of][0] + start + length
        return View(self.memory, self.data.narrow(dim, start, length), tuple(box), self.dims)

    def index(self, index: int) -> View:
        part = self.slice(index, 1)
        return View(self.memory, part.data[0], part.box, self.dims[1:])

    def permute(self, order: Sequence[int]) -> View:
        return View(self.memory, self.data.permute(order), self.box, tuple(self.dims[o] for o in order))

    def claim(self, doing: str, *kinds: str) -> None:
        """Raise MachineError if an operation of these kinds holds a part of this view."""
        for view, operation in self.memory.held:
            overlap = all(a < d and c < b for (a, b), (c, d) in zip(self.box, view.box, strict=True))
            if overlap and operation.kind in kinds:
                raise MachineError(f"{current().name}: {doing} {self} during {operation.what}")

    def read(self) -> Tensor:
        """Read by ordinary loads."""
        self.claim("a load of", "copy")
        return self.data.clone()

    def write(self, data: Tensor) -> None:
        """Write by ordinary stores, which the copy engine and ``wgmma`` see only after a fence."""
        if data.shape != self.data.shape or data.dtype != self.data.dtype:
            raise MachineError(f"a store of {list(data.shape)} {data.dtype} into {self.shape} {self.data.dtype} {self}")
        self.claim("a store into", "copy", "product", "store")
        self.data.copy_(data)
        current().issue("write", f"an unfenced store of {current().name}", self)

    @property
    def barrier(self) -> Barrier:
        try:
            return self.memory.barriers[int(self.data.storage_offset())]
        except KeyError:
            raise MachineError(f"{current().name}: the barrier {self} is not initialised") from None

    @barrier.setter
    def barrier(self, barrier: Barrier) -> None:
        at = int(self.data.storage_offset())
        if at in self.memory.barriers or barrier.count < 1:
            raise MachineError(f"{current().name}: {barrier} is initialised, for {barrier.count} arrivals or twice")
        self.memory.barriers[at] = barrier


def allocate(dtype: Any, torch_dtype: torch.dtype, shape: list[int], layout: Any, frame: FrameType) -> View:
    """Allocate poisoned shared memory, named after the variable to which the kernel at ``frame`` assigns it."""
    after = (i for i in dis.get_instructions(frame.f_code) if i.offset > frame.f_lasti)
    name = next((i.argval for i in after if i.opname.startswith("STORE")), "shared memory")
    data = torch.empty(shape, dtype=torch_dtype)
    poison(data)
    return View(Memory(name, dtype, layout), data, tuple((0, s) for s in shape), tuple(range(len(shape))))


def _baton() -> threading.Lock:
    """Return a lock that one thread acquires once another has released it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class Partition:
    """Some warps that run one function, in a thread that waits while another partition runs."""

    def __init__(self, program: Program, function: Callable[..., Any], args: Sequence[Any], name: str) -> None:
        self.program, self.function, self.args, self.name = program, function, args, name
        self.go, self.done, self.result = _baton(), False, None
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for: tuple[object, ...] = ()
        self.flying: dict[str, list[Operation]] = {"product": [], "store": [], "write": []}
        self.thread = threading.Thread(target=self._run, name=name)
        self.thread.start()

    def _run(self) -> None:
        self.go.acquire()
        _here.partition = self
        try:
            if self.program.failure is None:
                self.result = self.function(*self.args)
                for left in (*self.flying["product"], *self.flying["store"]):
                    raise MachineError(f"{self.name} ends during {left.what}")
        except _Ended:
            pass
        except BaseException as failure:
            self.program.failure = failure
        self.done = True
        self.program.back.release()

    def step(self, ready: Callable[[], bool] = lambda: True, *waits_for: object) -> None:
        """Let other partitions run until ``ready`` returns True. Errors name ``waits_for``."""
        self.ready, self.waits_for = ready, waits_for
        self.program.back.release()
        self.go.acquire()
        if self.program.failure is not None:
            raise _Ended

    def issue(self, kind: str, what: str, *views: View, finish: Callable[[], None] = lambda: None) -> None:
        self.flying[kind].append(Operation(kind, what, views, finish))

    def finish(self, kind: str, left: int = 0) -> None:
        """End the oldest operations of a kind that this partition issued, until so many are left."""
        flying = self.flying[kind]
        while len(flying) > left:
            flying.pop(0).end()
        self.step()


_here = threading.local()


def current() -> Partition:
    """The partition that runs."""
    partition: Partition = _here.partition
    return partition


class Program:
    """One block of a grid of ``programs``. ``copies``: those in flight, with the barrier that each goes to."""

    def __init__(self, index: int, programs: int, schedule: Schedule) -> None:
        self.index, self.programs, self.order = index, programs, schedule.order
        self.random = random.Random(f"{schedule.seed} {index}")
        self.back = _baton()
        self.failure: BaseException | None = None
        self.partitions: list[Partition] = []
        self.copies: list[tuple[Barrier, Operation]] = []
        self.turn = 0

    def run(self, function: Callable[..., Any], args: Sequence[Any]) -> None:
        """Raises what a partition raises, MachineError among it."""
        self.partitions.append(Partition(self, function, args, function.__name__))
        while living := [p for p in self.partitions if not p.done]:
            chosen = living[0] if self.failure else self._choose(living)
            if chosen is not None:
                chosen.go.release()
                self.back.acquire()
        for partition in self.partitions:
            partition.thread.join()
        if self.failure is None and self.copies:
            self.failure = MachineError(f"program {self.index} ends during {self.copies[0][1].what}")
        if self.failure is not None:
            raise self.failure

    def specialise(self, functions: Sequence[tuple[Callable[..., Any], Sequence[Any]]], warps: Sequence[int]) -> Any:
        """Run functions side by side, the first in the caller's warps, and give back what that one does."""
        if len(functions) != len(warps) + 1 or len(self.partitions) > 1:
            raise MachineError(
                f"{len(functions)} partitions for {len(warps)} workers, of {len(self.partitions)} so far"
            )
        workers = [Partition(self, f, args, f"{f.__name__} {i}") for i, (f, args) in enumerate(functions)]
        self.partitions += workers
        current().step(lambda: all(p.done for p in workers), "its partitions")
        return workers[0].result

    def _choose(self, living: list[Partition]) -> Partition | None:
        """Who goes on; None where a copy has landed instead, or nothing can go on, which is a failure."""
        ready = [p for p in living if p.ready()]
        early = self.order == "random" and self.random.random() < 0.2
        if early or not ready:
            needed = [copy for copy in self.copies if early or any(copy[0] in p.waits_for for p in living)]
            if needed:
                return self._land(self.random.choice(needed) if early else needed[-1 if self.order == "last" else 0])
        if not ready:
            said = "; ".join(f"{p.name} for {' '.join(map(str, p.waits_for))}" for p in living)
            self.failure = MachineError(f"program {self.index}: all wait: {said}")
            return None
        self.turn += 1
        if self.order == "random":
            return self.random.choice(ready)
        return ready[{"first": 0, "last": -1, "turns": self.turn % len(ready)}[self.order]]

    def _land(self, copy: tuple[Barrier, Operation]) -> None:
        self.copies.remove(copy)
        try:
            copy[1].end()
        except MachineError as failure:
            self.failure = failure
