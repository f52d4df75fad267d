"""Gluon's language on :mod:`tests.backends.triton.gluon_machine`: runs the kernels' own source as plain Python.

:func:`stand_ins` returns modules that replace ``triton.experimental.gluon`` and its languages. Layouts and types are
Triton's own. Only the layouts of tiles that are combined and of ``wgmma``'s operands are checked: compiling checks the
rest. Numbers are Python's.
"""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language
from triton.experimental.gluon.language import nvidia
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from tests.backends.triton.gluon_machine import (
    Barrier,
    MachineError,
    Operation,
    View,
    allocate,
    current,
    poison,
)

_DTYPES = {
    language.float32: torch.float32,
    language.float16: torch.float16,
    language.bfloat16: torch.bfloat16,
    language.int1: torch.bool,
    language.int32: torch.int32,
    language.int64: torch.int64,
}
_TYPES = {value: key for key, value in _DTYPES.items()}


@dataclass(eq=False)
class Tile:
    """A tensor in registers. Its values are never changed: no product can lose an operand in registers."""

    data: Tensor
    layout: Any = None

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return _TYPES[self.data.dtype]

    def to(self, dtype: Any) -> Tile:
        """Rounded to the nearest, ties to even, as PyTorch does."""
        return Tile(self.data.to(_DTYPES[dtype]), self.layout)

    def __getitem__(self, key: Any) -> Tile:
        return Tile(self.data[key], getattr(self.layout, "parent", None))


class Accumulator:
    """What products add up in; ``data`` is None while they do. Only a wait makes it a tile, that one may use."""

    def __init__(self, data: Tensor | None, layout: Any) -> None:
        self.data, self.layout = data, layout

    def _in_flight(self, *_: object) -> Any:
        raise MachineError(f"{current().name}: the sum of a product is used before it was waited for")

    to = __getitem__ = _in_flight


def _binary(function: Callable[[Any, Any], Tensor], swapped: bool = False) -> Callable[[Tile, Any], Any]:
    def apply(left: Tile, right: Any) -> Any:
        if isinstance(right, Accumulator):
            return right + left
        if not isinstance(right, (Tile, int, float)):
            return NotImplemented
        a, b, layout = left.data, right, left.layout
        if isinstance(right, Tile):
            if layout is not None and right.layout is not None and layout != right.layout:
                raise MachineError(f"{current().name}: tiles of different layouts meet: {layout} and {right.layout}")
            layout = layout or right.layout
            wide = torch.promote_types(a.dtype, right.data.dtype)
            a, b = a.to(wide), right.data.to(wide)
        return Tile(function(b, a) if swapped else function(a, b), layout)

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and_", "or_", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tile, f"__{_name.rstrip('_')}__", _binary(getattr(operator, _name)))
    setattr(Tile, f"__r{_name.rstrip('_')}__", _binary(getattr(operator, _name), swapped=True))
    for _kind in ("", "r"):
        setattr(Accumulator, f"__{_kind}{_name.rstrip('_')}__", Accumulator._in_flight)


class Number(int):
    """A scalar of a kernel: a Python number that may be asked to be wide."""

    def to(self, dtype: Any) -> Number:
        return self


def _number(function: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
    def apply(self: int, other: Any) -> Any:
        result = function(self, other)
        return result if result is NotImplemented else Number(result)

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _full in (f"__{_name}__", f"__r{_name}__"):
        setattr(Number, _full, _number(getattr(int, _full)))


@dataclass(eq=False)
class Pointer:
    """Addresses of elements of a tensor, or one address; ``offsets`` are in elements."""

    base: Tensor
    offsets: Any = 0

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.base, self.offsets + (offsets.data.long() if isinstance(offsets, Tile) else offsets))

    def reach(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The tensor's elements in a row, the offsets, and which of them are meant.

        Raises MachineError where one of those lies outside of the tensor.
        """
        base = self.base
        extent = 1 + sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
        mask = torch.as_tensor(True if mask is None else mask.data if isinstance(mask, Tile) else mask)
        offsets, mask = torch.broadcast_tensors(torch.as_tensor(self.offsets), mask)
        outside = mask & ((offsets < 0) | (offsets >= extent))
        if outside.any():
            at = int(offsets[outside][0])
            raise MachineError(f"{current().name}: element {at} of a tensor of {list(base.shape)}, not masked")
        return base.as_strided((extent,), (1,), base.storage_offset()), offsets, mask


@dataclass(eq=False)
class Boxes:
    """A tensor's description for the copy engine, as a kernel sees it."""

    base: Tensor
    block_shape: list[int]
    layout: Any

    @property
    def dtype(self) -> Any:
        return _TYPES[self.base.dtype]

    def places(self, at: Sequence[int], view: View) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """The part of the box at these coordinates that lies in the matrix: where there, and where in the box.

        Raises MachineError if no such box can lie in the view.
        """
        what = f"{current().name}: a box of {self.block_shape} {self.base.dtype} at {list(at)}, {view}"
        if view.shape != self.block_shape or view.data.dtype != self.base.dtype or len(at) != self.base.dim():
            raise MachineError(f"{what} of {view.shape} {view.data.dtype}")
        if not view.data.is_contiguous() or view.data.storage_offset() * view.data.element_size() % 128:
            raise MachineError(f"{what} does not begin at a multiple of 128 bytes, or is not whole")
        ends = [
            (max(first, 0), max(min(first + length, size), first, 0))
            for size, length, first in zip(self.base.shape, self.block_shape, at, strict=True)
        ]
        inside = tuple(slice(low, high) for low, high in ends)
        return inside, tuple(slice(low - first, high - first) for (low, high), first in zip(ends, at, strict=True))


def _load(pointer: Pointer, mask: Any = None, other: Any = None) -> Tile:
    """What is masked and has no ``other`` is poisoned."""
    row, offsets, mask = pointer.reach(mask)
    out = torch.empty(offsets.shape, dtype=row.dtype)
    poison(out) if other is None else out.fill_(other)
    out[mask] = row[offsets[mask]]
    return Tile(out)


def _store(pointer: Pointer, value: Tile, mask: Any = None) -> None:
    row, offsets, mask = pointer.reach(mask)
    row[offsets[mask]] = value.data.to(row.dtype).expand(offsets.shape)[mask]


def _sum(tile: Tile, axis: int) -> Tile:
    return Tile(tile.data.sum(axis, dtype=tile.data.dtype), tile.layout and language.SliceLayout(axis, tile.layout))


def _where(condition: Tile, a: Any, b: Any) -> Tile:
    data = torch.where(condition.data, *(t.data if isinstance(t, Tile) else t for t in (a, b)))
    return Tile(data, condition.layout)


def _assume(condition: object) -> None:
    if not condition:
        raise MachineError(f"{current().name}: what is assumed does not hold")


def _inline_asm(asm: str, constraints: str, args: list[Tile], dtype: Any, is_pure: bool, pack: int) -> Tile:
    """Shifts and masks of 32-bit registers that hold a pair of 16-bit values each, to one float32 register for each.

    Raises MachineError where an output that may share the input's register is written before the input is read.
    """
    (tile,) = args
    outputs = constraints.split(",")[:-1]
    if (pack, len(outputs), tile.data.element_size(), dtype) != (2, 2, 2, language.float32):
        raise MachineError(f"inline assembly that the model does not know: {asm}")
    registers = {"$2": tile.data.contiguous().view(torch.int32).long() & 0xFFFFFFFF}
    for line in filter(None, map(str.strip, asm.split(";"))):
        match = re.fullmatch(r"(shl|and)\.b32 (\$[01]), (\$[012]), (\w+)", line)
        if match is None:
            raise MachineError(f"inline assembly that the model does not know: {line}")
        name, to, of, number = match[1], match[2], match[3], int(match[4], 0)
        if of == "$2" and any("&" not in outputs[int(written[1])] for written in registers if written != "$2"):
            raise MachineError(f"{line}: {of} may have been overwritten")
        registers[to] = (registers[of] << number if name == "shl" else registers[of] & number) & 0xFFFFFFFF
    both = torch.stack([registers["$0"], registers["$1"]], -1).flatten(-2)
    return Tile(both.to(torch.int32).view(torch.float32), tile.layout)


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> View:
    return allocate(dtype, _DTYPES[dtype], list(shape), layout, sys._getframe(1))


def _init(at: View, count: int) -> None:
    at.barrier = Barrier(str(at), count)


def _wait(at: View, phase: int) -> None:
    """Passes while the phase of this parity is the last that was completed."""
    if phase not in (0, 1):
        raise MachineError(f"{current().name} waits for parity {phase} of {at}")
    barrier = at.barrier
    current().step(lambda: barrier.phase % 2 != phase, f"parity {phase} of", barrier)


def _arrive(at: View, *, count: int = 1, pred: Any = True) -> None:
    if pred:
        at.barrier.arrive(count)
        current().step()


def _expect(at: View, size: int) -> None:
    at.barrier.arrive(1, size)
    current().step()


def _copy_in(boxes: Boxes, at: Sequence[int], barrier: View, to: View) -> None:
    """A box to shared memory, zeros where it lies outside of the matrix; all of its bytes go to the barrier."""
    inside, within = boxes.places(at, to)
    to.claim("a copy into", "copy", "product", "store")
    poison(to.data)
    target = barrier.barrier

    def land() -> None:
        to.data.zero_()
        to.data[within] = boxes.base[inside]
        target.land(to.bytes)

    current().program.copies.append((target, Operation("copy", f"the copy of {list(at)} into {to}", (to,), land)))
    current().step()


def _copy_out(boxes: Boxes, at: Sequence[int], of: View) -> None:
    """A box from shared memory; what lies outside of the matrix is dropped."""
    inside, within = boxes.places(at, of)
    of.claim("a store to global memory of", "copy", "write")

    def land() -> None:
        boxes.base[inside] = of.data[within]

    current().issue("store", f"the store of {of} to {list(at)}", of, finish=land)
    current().step()


def _multiply(a: Tile | View, b: View, acc: Accumulator, *, is_async: bool) -> Accumulator:
    """a (registers or shared memory) times b, added up in float32."""
    if not is_async:
        raise MachineError("wgmma that waits for itself: the kernels overlap all of them")
    if isinstance(a, Tile):
        layout = a.layout
        if not isinstance(layout, language.DotOperandLayout) or (layout.operand_index, layout.parent) != (
            0,
            acc.layout,
        ):
            raise MachineError(f"wgmma of registers laid out as {layout}, into {acc.layout}")
    if a.dtype != b.dtype or a.dtype not in (language.float16, language.bfloat16) or a.shape[1] != b.shape[0]:
        raise MachineError(f"wgmma of {a.shape} {a.dtype} and {b.shape} {b.dtype}")
    views = tuple(v for v in (a, b) if isinstance(v, View))
    for view in views:
        view.claim("a product of", "copy", "write")
    out = Accumulator(None, acc.layout)

    def finish() -> None:
        product = a.data.float() @ b.data.float()
        if product.shape != acc.data.shape:
            raise MachineError(f"wgmma of {a.shape} and {b.shape} into {list(acc.data.shape)}")
        out.data = acc.data + product

    current().issue("product", f"{current().name}'s product of {' and '.join(map(str, views))}", *views, finish=finish)
    current().step()
    return out


def _wait_products(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    current().finish("product", num_outstanding)
    out = [d if d.data is None else Tile(d.data, d.layout) if isinstance(d, Accumulator) else d for d in deps]
    return out[0] if len(out) == 1 else tuple(out)


def _standing_in(module: ModuleType, **names: Any) -> ModuleType:
    """A copy of a module with other things by these names."""
    copy = ModuleType(module.__name__)
    copy.__dict__.update({**module.__dict__, **names})
    return copy


View.load = lambda view, layout: Tile(view.read(), layout)
View.store = lambda view, value: view.write(value.data)


def stand_ins(jit: Callable[..., Any]) -> dict[str, ModuleType]:
    """Modules of Gluon by name, as kernels are to import them; ``jit`` is their ``gluon.jit``."""
    barriers = _standing_in(mbarrier, init=_init, wait=_wait, arrive=_arrive, expect=_expect)
    boxes = _standing_in(
        tma,
        **dict.fromkeys(("async_load", "async_copy_global_to_shared"), _copy_in),
        **dict.fromkeys(("async_store", "async_copy_shared_to_global"), _copy_out),
        store_wait=lambda pendings: current().finish("store", pendings),
    )
    on_hopper = _standing_in(
        hopper,
        mbarrier=barriers,
        tma=boxes,
        fence_async_shared=lambda: current().finish("write"),
        warpgroup_mma=_multiply,
        warpgroup_mma_init=lambda sum: sum if isinstance(sum, Accumulator) else Accumulator(sum.data, sum.layout),
        warpgroup_mma_wait=_wait_products,
    )
    on_nvidia = _standing_in(nvidia, hopper=on_hopper)
    gl = _standing_in(
        language,
        nvidia=on_nvidia,
        constexpr=lambda value: value,
        static_range=range,
        assume=_assume,
        program_id=lambda axis: Number(current().program.index),
        num_programs=lambda axis: Number(current().program.programs),
        cdiv=lambda a, b: (a + b - 1) // b,
        load=_load,
        store=_store,
        arange=lambda start, end, layout=None: Tile(torch.arange(start, end, dtype=torch.int32), layout),
        zeros=lambda shape, dtype, layout=None: Tile(torch.zeros(shape, dtype=_DTYPES[dtype]), layout),
        expand_dims=lambda tile, axis: Tile(tile.data.unsqueeze(axis), getattr(tile.layout, "parent", None)),
        sum=_sum,
        reshape=lambda tile, shape: Tile(tile.data.reshape(shape)),
        permute=lambda tile, order: Tile(tile.data.permute(order)),
        split=lambda tile: tuple(Tile(half) for half in tile.data.unbind(-1)),
        where=_where,
        minimum=min,
        convert_layout=lambda tile, layout: Tile(tile.data, layout),
        inline_asm_elementwise=_inline_asm,
        allocate_shared_memory=_allocate,
        warp_specialize=lambda functions, warps, registers=None: current().program.specialise(functions, warps),
    )
    root = _standing_in(gluon, language=gl, jit=jit, constexpr_function=lambda function: function)
    return {module.__name__: module for module in (root, gl, on_nvidia, on_hopper, barriers, boxes)}
