"""A model of one Hopper multiprocessor as Gluon shows it: shared memory, the copy engine, mbarriers, ``wgmma``.

Everything asynchronous happens as late as a wait allows. From its issue to its end an operation holds its shared
memory: a copy has poisoned what it will write, a product or a store has yet to read. Who touches held memory in a
way that could show on the hardware is an error, and so is a barrier that is armed twice, an end with something
still in flight, and a deadlock. Partitions are threads, of which one runs at a time; they change places at every
synchronising call, in the order that a :class:`Schedule` says.
"""

from __future__ import annotations

import linecache
import math
import random
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class MachineError(Exception):
    """What hardware would hang on, or answer by wrong numbers."""


class _Ended(BaseException):
    """Unwinds the partitions of a program that has failed elsewhere."""


@dataclass(frozen=True)
class Schedule:
    """Who goes on where several could.

    ``order``: "first" (partitions in their order: consumers before the producer), "last" (the producer first),
    "turns", or "random" by ``seed``, in which case copies also land before anybody needs them. ``backwards``: programs
    run from the last to the first.
    """

    order: str = "first"
    seed: int = 0
    backwards: bool = False


@dataclass(eq=False)
class Operation:
    """Something in flight: ``kind`` is "copy", "product", "store", or "write" (ordinary, and not fenced yet)."""

    kind: str
    what: str
    views: tuple[View, ...]
    finish: Callable[[], None] = lambda: None

    def begin(self) -> Operation:
        for view in self.views:
            view.memory.held.append((view, self))
        return self

    def end(self) -> None:
        for view in self.views:
            view.memory.held.remove((view, self))
        self.finish()


@dataclass(eq=False)
class Barrier:
    """An mbarrier: ``phase`` counts those completed; of the current one ``arrivals`` and ``bytes`` are awaited."""

    name: str
    count: int

    def __post_init__(self) -> None:
        self.phase, self.arrivals, self.bytes = 0, self.count, 0

    def __str__(self) -> str:
        return f"{self.name} (phase {self.phase}, awaits {self.arrivals} of {self.count} arrivals, {self.bytes} bytes)"

    def arrive(self, count: int, expected: int = 0) -> None:
        if count > self.arrivals:
            raise MachineError(f"{self}: {count} arrivals more than the phase has left")
        self.arrivals -= count
        self.bytes += expected
        self._settle()

    def land(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0 and self.arrivals == 0:
            raise MachineError(f"{self}: {size} bytes landed, more than were expected")
        self._settle()

    def _settle(self) -> None:
        if self.arrivals == 0 and self.bytes == 0:
            self.phase, self.arrivals = self.phase + 1, self.count


@dataclass(eq=False)
class Memory:
    """One allocation of shared memory, poisoned until written."""

    name: str
    dtype: Any
    data: Tensor
    layout: Any
    held: list[tuple[View, Operation]] = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)


def _poison(data: Tensor) -> None:
    data.fill_(math.nan if data.is_floating_point() else -1)


@dataclass(eq=False)
class View:
    """A part of an allocation: its elements, and the box ``[first, end)`` of them that it lies in.

    ``dims``: which dimension of the allocation each of the view's is.
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

    def _part(self, data: Tensor, dim: int, first: int, length: int, dims: tuple[int, ...]) -> View:
        if not (0 <= first and first + length <= self.data.shape[dim]):
            raise MachineError(f"{self}: [{first}:{first + length}] of {self.data.shape[dim]} in dimension {dim}")
        box = list(self.box)
        start = box[self.dims[dim]][0] + first
        box[self.dims[dim]] = start, start + length
        return View(self.memory, data, tuple(box), dims)

    def index(self, index: Any) -> View:
        index = int(index)
        size = len(self.data)
        return self._part(self.data[min(max(index, 0), size - 1)], 0, index, 1, self.dims[1:])

    def slice(self, start: Any, length: Any, dim: Any = 0) -> View:
        start, length, dim = int(start), int(length), int(dim)
        within = self.data.narrow(dim, start, length) if 0 <= start <= self.data.shape[dim] - length else self.data
        return self._part(within, dim, start, length, self.dims)

    def permute(self, order: Iterable[Any]) -> View:
        order = [int(o) for o in order]
        return View(self.memory, self.data.permute(order), self.box, tuple(self.dims[o] for o in order))

    def overlaps(self, other: View) -> bool:
        return all(a < d and c < b for (a, b), (c, d) in zip(self.box, other.box, strict=True))

    def claim(self, doing: str, *kinds: str) -> None:
        """Raises MachineError if an operation of these kinds holds a part of this."""
        for view, operation in self.memory.held:
            if operation.kind in kinds and self.overlaps(view):
                raise MachineError(f"{current().name}: {doing} {self} during {operation.what}")

    def read(self) -> Tensor:
        """By ordinary loads."""
        self.claim("a load of", "copy")
        return self.data.clone()

    def write(self, data: Tensor) -> None:
        """By ordinary stores, which the copy engine and ``wgmma`` see after a fence only."""
        if data.shape != self.data.shape or data.dtype != self.data.dtype:
            raise MachineError(f"{self}: a store of {list(data.shape)} {data.dtype} into {self.shape}")
        self.claim("a store into", "copy", "product", "store")
        self.data.copy_(data)
        partition = current()
        partition.writes.append(Operation("write", f"an unfenced store of {partition.name}", (self,)).begin())

    @property
    def barrier(self) -> Barrier:
        at = int(self.data.storage_offset())
        if at not in self.memory.barriers:
            raise MachineError(f"{current().name} uses the barrier {self}, which is not initialised")
        return self.memory.barriers[at]


class Accumulator:
    """What products add up in: nobody may look at it before a wait has given it back. ``data`` is None until then."""

    def __init__(self, data: Tensor | None, layout: Any) -> None:
        self.data, self.layout = data, layout


class Partition:
    """Some warps that run one function, in a thread that stands still while another partition's goes on."""

    def __init__(self, program: Program, function: Callable[..., Any], args: tuple[Any, ...], name: str) -> None:
        self.program, self.name = program, name
        self.go, self.ready, self.waits_for = threading.Semaphore(0), (lambda: True), ""
        self.barrier: Barrier | None = None
        self.done, self.result, self.failure = False, None, None
        self.products: list[Operation] = []
        self.stores: list[Operation] = []
        self.writes: list[Operation] = []
        self.thread = threading.Thread(target=self._run, args=(function, args), name=name)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.go.acquire()
        _here.partition = self
        try:
            if self.program.failure is None:
                self.result = function(*args)
                for kind, left in (("product", self.products), ("store", self.stores)):
                    if left:
                        raise MachineError(f"{self.name} ends with a {kind} in flight: {left[0].what}")
        except _Ended:
            pass
        except BaseException as failure:
            self.program.failure = self.program.failure or failure
        self.done = True
        self.program.back.release()

    def step(
        self, ready: Callable[[], bool] = lambda: True, waits_for: str = "", barrier: Barrier | None = None
    ) -> None:
        """Let the others go on; come back when ``ready`` holds."""
        self.ready, self.waits_for, self.barrier = ready, waits_for, barrier
        self.program.back.release()
        self.go.acquire()
        if self.program.failure is not None:
            raise _Ended


_here = threading.local()


def current() -> Partition:
    partition: Partition = _here.partition
    return partition


class Program:
    """One block of the grid."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], num_warps: int, schedule: Schedule) -> None:
        self.index, self.grid, self.num_warps, self.schedule = index, grid, num_warps, schedule
        self.random = random.Random(f"{schedule.seed} {index}")
        self.back = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.partitions: list[Partition] = []
        self.copies: list[tuple[Barrier, Operation]] = []
        self.turn = 0

    def start(self, function: Callable[..., Any], args: tuple[Any, ...], name: str) -> Partition:
        partition = Partition(self, function, args, name)
        self.partitions.append(partition)
        partition.thread.start()
        return partition

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Raises what a partition raises, MachineError among it."""
        self.start(function, args, function.__name__)
        while living := [p for p in self.partitions if not p.done]:
            chosen = living[0] if self.failure else self._choose(living)
            if chosen is not None:
                chosen.go.release()
                self.back.acquire()
        for partition in self.partitions:
            partition.thread.join()
        if self.failure is None and self.copies:
            self.failure = MachineError(f"the program ends during {self.copies[0][1].what}")
        if self.failure is not None:
            raise self.failure

    def _choose(self, living: list[Partition]) -> Partition | None:
        """Who goes on; None after a copy has landed, or where nothing can go on, which is a failure."""
        ready = [p for p in living if p.ready()]
        order = self.schedule.order
        if order == "random" and self.copies and (not ready or self.random.random() < 0.2):
            return self._land(self.random.choice(self.copies))
        if not ready:
            awaited = [copy for copy in self.copies if any(p.barrier is copy[0] for p in living)]
            if awaited:
                return self._land(awaited[-1 if order == "last" else 0])
            what = "; ".join(f"{p.name} for {p.waits_for}" for p in living)
            self.failure = MachineError(f"program {self.index}: all wait: {what}")
            return None
        self.turn += 1
        if order == "random":
            return self.random.choice(ready)
        return ready[{"first": 0, "last": -1, "turns": self.turn % len(ready)}[order]]

    def _land(self, copy: tuple[Barrier, Operation]) -> None:
        self.copies.remove(copy)
        try:
            copy[1].end()
        except MachineError as failure:
            self.failure = failure


def specialise(partitions: list[tuple[Callable[..., Any], tuple[Any, ...]]], warps: list[int]) -> Any:
    """Run functions side by side, the first in the caller's warps, and give back what that one does."""
    if len(partitions) != len(warps) + 1:
        raise MachineError(f"{len(partitions)} partitions with numbers of warps for {len(warps)} beside the first")
    here = current()
    if len(here.program.partitions) > 1:
        raise MachineError("warp_specialize inside of warp_specialize")
    started = [
        here.program.start(function, tuple(args), f"{function.__name__} {number}")
        for number, (function, args) in enumerate(partitions)
    ]
    here.step(lambda: all(p.done for p in started), "its partitions")
    return started[0].result


def allocate(dtype: Any, torch_dtype: torch.dtype, shape: list[int], layout: Any) -> View:
    """Shared memory that is named after the variable that the kernel puts it in."""
    frame: Any = sys._getframe()
    while frame.f_globals.get("__name__") in (__name__, "tests.backends.triton.gluon_language"):
        frame = frame.f_back
    name = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split("=")[0].strip() or "shared memory"
    data = torch.empty(shape, dtype=torch_dtype)
    _poison(data)
    return View(Memory(name, dtype, data, layout), data, tuple((0, s) for s in shape), tuple(range(len(shape))))


def init_barrier(at: View, count: int) -> None:
    key = int(at.data.storage_offset())
    if key in at.memory.barriers:
        raise MachineError(f"the barrier {at} is initialised twice")
    if count < 1:
        raise MachineError(f"the barrier {at} of {count} arrivals")
    at.memory.barriers[key] = Barrier(str(at), count)


def arrive(barrier: Barrier, count: int, expected: int = 0) -> None:
    barrier.arrive(count, expected)
    current().step()


def wait_barrier(barrier: Barrier, parity: int) -> None:
    """Passes once the phase of this parity is the last that was completed."""
    if parity not in (0, 1):
        raise MachineError(f"{current().name} waits for parity {parity} of {barrier}")
    current().step(lambda: barrier.phase % 2 != parity, f"parity {parity} of {barrier}", barrier)


def _clipped(shape: Iterable[int], box: Iterable[int], at: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a box at these coordinates that lies in the matrix: slices of the matrix, and of the box."""
    inside, within = [], []
    for size, length, first in zip(shape, box, at, strict=True):
        low, high = min(max(first, 0), size), max(min(first + length, size), 0)
        high = max(low, high)
        inside.append(slice(low, high))
        within.append(slice(low - first, high - first) if high > low else slice(0, 0))
    return tuple(inside), tuple(within)


def _check_box(matrix: Tensor, box: list[int], at: list[int], view: View, doing: str) -> None:
    if view.shape != box or view.data.dtype != matrix.dtype:
        raise MachineError(f"{doing}: {view} is {view.shape} {view.data.dtype}, the box {box} {matrix.dtype}")
    if len(at) != matrix.dim():
        raise MachineError(f"{doing}: {len(at)} coordinates of {matrix.dim()}")
    if not view.data.is_contiguous() or view.data.storage_offset() * view.data.element_size() % 128:
        raise MachineError(f"{doing}: {view} is no box that begins at a multiple of 128 bytes")


def copy_in(matrix: Tensor, box: list[int], at: list[int], barrier: Barrier, to: View) -> None:
    """A box to shared memory, zeros where it lies outside of the matrix; its bytes go to the barrier."""
    what = f"the copy of {box} at {at} into {to}"
    _check_box(matrix, box, at, to, what)
    to.claim("a copy into", "copy", "product", "store")
    _poison(to.data)

    def land() -> None:
        inside, within = _clipped(matrix.shape, box, at)
        to.data.zero_()
        to.data[within] = matrix[inside]
        barrier.land(to.bytes)

    partition = current()
    partition.program.copies.append((barrier, Operation("copy", what, (to,), land).begin()))
    partition.step()


def copy_out(matrix: Tensor, box: list[int], at: list[int], of: View) -> None:
    """A box from shared memory, which is read when a wait makes it; what lies outside of the matrix is dropped."""
    partition = current()
    what = f"the store of {of} to {at}"
    _check_box(matrix, box, at, of, what)
    of.claim("a store to global memory of", "copy", "write")

    def land() -> None:
        inside, within = _clipped(matrix.shape, box, at)
        matrix[inside] = of.data[within]

    partition.stores.append(Operation("store", what, (of,), land).begin())
    partition.step()


def multiply(a: Tensor | View, b: View, total: Accumulator, use_total: bool) -> Accumulator:
    """The product of a (registers or shared memory) and b, added to the total in float32, when a wait makes it."""
    partition = current()
    views = tuple(v for v in (a, b) if isinstance(v, View))
    out = Accumulator(None, total.layout)
    for view in views:
        view.claim("a product of", "copy", "write")

    def finish() -> None:
        left, right = (v.data if isinstance(v, View) else v for v in (a, b))
        product = left.float() @ right.float()
        out.data = total.data + product if use_total else product

    what = f"the product of {' and '.join(map(str, views))} in {partition.name}"
    partition.products.append(Operation("product", what, views, finish).begin())
    partition.step()
    return out


def _finish(operations: list[Operation], left: int) -> None:
    while len(operations) > left:
        operations.pop(0).end()
    current().step()


def wait_products(left: int) -> None:
    _finish(current().products, left)


def wait_stores(left: int) -> None:
    _finish(current().stores, left)


def fence() -> None:
    """What this partition wrote is from now on seen by the copy engine and ``wgmma``."""
    _finish(current().writes, 0)
