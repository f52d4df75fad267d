"""Gluon's language on :mod:`tests.backends.triton.gluon_machine`: kernels' own source as plain Python.

:func:`load` imports a package of kernels anew, with stand-ins in place of ``triton.experimental.gluon`` and its
modules, and with planted faults where asked for. Layouts and types are Triton's own; of layouts only what ``wgmma``
needs is looked at: what else a compiler refuses, compiling shows.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import operator
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language
from triton.experimental.gluon.language import nvidia
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.backends.triton import gluon_machine as machine
from tests.backends.triton.gluon_machine import Accumulator, MachineError, Program, Schedule, View, current

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
    """A tensor in registers. Its values are never changed, so that no product can lose an operand in registers."""

    data: Tensor
    layout: Any = None

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> Any:
        return _TYPES[self.data.dtype]

    def to(self, dtype: Any, bitcast: bool = False) -> Tile:
        """Rounded to the nearest, ties to even, as PyTorch does."""
        if bitcast:
            raise MachineError("a bitcast, which the model does not know")
        return Tile(self.data.to(_DTYPES[dtype]), self.layout)

    def __getitem__(self, key: Any) -> Tile:
        return Tile(self.data[key], getattr(self.layout, "parent", None))

    def __int__(self) -> int:
        return int(self.data)

    __index__ = __int__

    def __bool__(self) -> bool:
        return bool(self.data)

    def __neg__(self) -> Tile:
        return Tile(-self.data, self.layout)


def _binary(function: Callable[[Any, Any], Tensor], swapped: bool = False) -> Callable[[Tile, Any], Any]:
    def apply(left: Tile, right: Any) -> Any:
        if isinstance(right, (Pointer, Accumulator, View)):
            return NotImplemented
        a, b, layout = left.data, right, left.layout
        if isinstance(right, Tile):
            if layout is not None and right.layout is not None and layout != right.layout:
                raise MachineError(f"two tiles of different layouts: {layout} and {right.layout}")
            b, layout = right.data, layout or right.layout
            wide = torch.promote_types(a.dtype, b.dtype)
            a, b = a.to(wide), b.to(wide)
        return Tile(function(b, a) if swapped else function(a, b), layout)

    return apply


for _name in "add sub mul truediv floordiv mod and_ or_ xor lshift rshift lt le gt ge eq ne".split():
    setattr(Tile, f"__{_name.rstrip('_')}__", _binary(getattr(operator, _name)))
    setattr(Tile, f"__r{_name.rstrip('_')}__", _binary(getattr(operator, _name), swapped=True))


@dataclass(eq=False)
class Pointer:
    """Addresses of elements of a tensor, or one address; ``offsets`` are in elements."""

    base: Tensor
    offsets: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=_TYPES[self.base.dtype])

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.base, self.offsets + (offsets.data.long() if isinstance(offsets, Tile) else offsets))

    __radd__ = __add__

    def reach(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The tensor's elements in a row, the offsets, and which of them are meant.

        Raises MachineError where one of those lies outside of the tensor.
        """
        offsets = torch.as_tensor(self.offsets)
        mask = torch.as_tensor(True if mask is None else getattr(mask, "data", mask))
        offsets, mask = torch.broadcast_tensors(offsets, mask)
        base = self.base
        extent = 1 + sum((size - 1) * stride for size, stride in zip(base.shape, base.stride(), strict=True))
        outside = mask & ((offsets < 0) | (offsets >= (extent if base.numel() else 0)))
        if outside.any():
            raise MachineError(
                f"{current().name}: element {int(offsets[outside][0])} of a tensor of {list(base.shape)}, not masked"
            )
        return base.as_strided((extent,), (1,), base.storage_offset()), offsets, mask


@dataclass(eq=False)
class Descriptor:
    """A tensor's boxes, as a kernel sees them."""

    base: Tensor
    block_shape: list[int]
    layout: Any

    @property
    def dtype(self) -> Any:
        return _TYPES[self.base.dtype]

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(shape=self.block_shape, element_ty=self.dtype, nbytes=self.nbytes_per_cta)

    @property
    def nbytes_per_cta(self) -> int:
        return int(torch.Size(self.block_shape).numel()) * self.base.element_size()


def _layout_of(value: Tile) -> Any:
    return value.layout


def load_global(pointer: Pointer, mask: Any = None, other: Any = None, **_: Any) -> Tile:
    """What is masked and has no ``other`` is poisoned."""
    row, offsets, mask = pointer.reach(mask)
    other = getattr(other, "data", other)
    fill = float("nan") if other is None and row.is_floating_point() else other or 0
    out = torch.full(offsets.shape, fill, dtype=row.dtype)
    out[mask] = row[offsets[mask]]
    return Tile(out)


def store_global(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    row, offsets, mask = pointer.reach(mask)
    data = torch.as_tensor(getattr(value, "data", value)).to(row.dtype).expand(offsets.shape)
    row[offsets[mask]] = data[mask]


def _arange(start: Any, end: Any, layout: Any = None) -> Tile:
    return Tile(torch.arange(int(start), int(end), dtype=torch.int32), layout)


def _full(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Tile:
    return Tile(torch.full([int(s) for s in shape], getattr(value, "data", value), dtype=_DTYPES[dtype]), layout)


def _expand_dims(tile: Tile, axis: Any) -> Tile:
    return Tile(tile.data.unsqueeze(int(axis)), getattr(tile.layout, "parent", None))


def _reduced(tile: Tile, axis: int) -> Any:
    return None if tile.layout is None else language.SliceLayout(axis, tile.layout)


def _sum(tile: Tile, axis: Any = None, keep_dims: Any = False) -> Tile:
    if axis is None:
        return Tile(tile.data.sum(dtype=tile.data.dtype))
    data = tile.data.sum(int(axis), keepdim=bool(keep_dims), dtype=tile.data.dtype)
    return Tile(data, tile.layout if keep_dims else _reduced(tile, int(axis)))


def _chosen(function: Callable[[Any, Any], Tensor], plain: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A function of two tiles, or of two numbers."""

    def apply(a: Any, b: Any) -> Any:
        if not isinstance(a, Tile) and not isinstance(b, Tile):
            return plain(a, b)
        x, y = (torch.as_tensor(getattr(t, "data", t)) for t in (a, b))
        return Tile(function(x, y), getattr(a, "layout", None) or getattr(b, "layout", None))

    return apply


def _where(condition: Any, a: Any, b: Any) -> Tile:
    data = torch.where(condition.data, *(getattr(t, "data", t) for t in (a, b)))
    return Tile(data, condition.layout or getattr(a, "layout", None))


def _convert_layout(tile: Tile, layout: Any, assert_trivial: bool = False) -> Tile:
    return Tile(tile.data, layout)


def _assume(condition: Any) -> None:
    if not condition:
        raise MachineError("what the kernel assumes does not hold")


def _inline_asm(asm: Any, constraints: str, args: list[Tile], dtype: Any, is_pure: Any, pack: Any) -> Tile:
    """Shifts and masks of 32-bit registers that hold a pair of 16-bit values each, to one float32 register for each.

    Raises MachineError where an output that may share the input's register is written before the input is read.
    """
    (tile,) = args
    outputs = constraints.split(",")[:-1]
    if pack != 2 or len(outputs) != 2 or tile.data.element_size() != 2 or dtype is not language.float32:
        raise MachineError(f"inline assembly that the model does not know: {asm}")
    pairs = tile.data.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    registers: dict[str, Tensor] = {"$2": pairs}
    for line in filter(None, (part.strip() for part in asm.split(";"))):
        match = re.fullmatch(r"(shl|and)\.b32 (\$[01]), (\$[012]), (\w+)", line)
        if match is None:
            raise MachineError(f"inline assembly that the model does not know: {line}")
        name, to, of, number = match.groups()
        if of == "$2" and any("&" not in outputs[int(written[1])] for written in registers if written != "$2"):
            raise MachineError(f"{line}: {of} may have been overwritten")
        registers[to] = (
            registers[of] << int(number, 0) if name == "shl" else registers[of] & int(number, 0)
        ) & 0xFFFFFFFF
    both = torch.stack([registers["$0"], registers["$1"]], -1).flatten(-2)
    return Tile(both.to(torch.int32).view(torch.float32), tile.layout)


def _load_shared(view: View, layout: Any) -> Tile:
    return Tile(view.read(), layout)


def _store_shared(view: View, value: Tile) -> None:
    view.write(value.data)


View.load, View.store = _load_shared, _store_shared  # type: ignore[attr-defined]


def _allocate(dtype: Any, shape: Any, layout: Any, value: Tile | None = None) -> View:
    view = machine.allocate(dtype, _DTYPES[dtype], [int(s) for s in shape], layout)
    if value is not None:
        view.write(value.data)
    return view


def _warpgroup_mma(
    a: Tile | View, b: View, acc: Any, *, use_acc: Any = True, precision: Any = None, is_async: Any = False
) -> Any:
    if not isinstance(b, View):
        raise MachineError("the right operand of wgmma is in shared memory")
    if isinstance(a, Tile):
        layout = a.layout
        if not isinstance(layout, language.DotOperandLayout) or layout.operand_index != 0:
            raise MachineError(f"the left operand of wgmma in registers has the layout {layout}")
        if layout.parent != acc.layout:
            raise MachineError(f"the left operand of wgmma belongs to {layout.parent}, the sums to {acc.layout}")
    if a.dtype != b.dtype or a.dtype not in (language.float16, language.bfloat16):
        raise MachineError(f"wgmma of {a.dtype} and {b.dtype}")
    if acc.data is not None and list(acc.data.shape) != [a.shape[0], b.shape[1]] or a.shape[1] != b.shape[0]:
        raise MachineError(f"wgmma of {a.shape} and {b.shape} into {list(acc.data.shape)}")
    out = machine.multiply(a if isinstance(a, View) else a.data, b, acc, bool(use_acc))
    return out if is_async else _warpgroup_mma_wait(0, [out])


def _warpgroup_mma_wait(num_outstanding: Any = 0, deps: Any = None) -> Any:
    machine.wait_products(int(num_outstanding))
    out = tuple(Tile(d.data, d.layout) if getattr(d, "data", None) is not None else d for d in deps)
    return out[0] if len(out) == 1 else out


def _init(at: View, count: Any) -> None:
    machine.init_barrier(at, int(count))


def _wait(at: View, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    if pred:
        machine.wait_barrier(at.barrier, int(phase))


def _arrive(at: View, *, count: Any = 1, pred: Any = True) -> None:
    if pred:
        machine.arrive(at.barrier, int(count))


def _expect(at: View, size: Any, pred: Any = True) -> None:
    if pred:
        machine.arrive(at.barrier, 1, int(size))


def _load_box(desc: Descriptor, coord: Any, barrier: View, result: View, pred: Any = True) -> None:
    if pred:
        machine.copy_in(desc.base, desc.block_shape, [int(c) for c in coord], barrier.barrier, result)


def _store_box(desc: Descriptor, coord: Any, src: View) -> None:
    machine.copy_out(desc.base, desc.block_shape, [int(c) for c in coord], src)


@dataclass
class Kernel:
    """What ``gluon.jit`` makes: a function for other kernels, ``kernel[grid](...)`` for the host."""

    fn: Callable[..., Any]

    def __post_init__(self) -> None:
        self.__name__ = self.fn.__name__
        self.arg_names = list(inspect.signature(self.fn).parameters)

    def __call__(self, *args: Any, **constants: Any) -> Any:
        return self.fn(*args, **constants)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int = 4, **more: Any) -> None:
            given = [_on_device(a) for a in args] + [_on_device(more[n]) for n in self.arg_names[len(args) :]]
            schedule = _schedules[-1]
            programs = [(x, y) for y in range(([*grid, 1])[1]) for x in range(grid[0])]
            for index in reversed(programs) if schedule.backwards else programs:
                Program(index, tuple(grid), num_warps, schedule).run(self.fn, tuple(given))

        return launch


def _on_device(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Pointer(argument)
    if isinstance(argument, TensorDescriptor):
        matrix = argument.base.as_strided(argument.shape, argument.strides, argument.base.storage_offset())
        return Descriptor(matrix, list(argument.block_shape), argument.layout)
    return argument


_schedules = [Schedule()]


@contextlib.contextmanager
def scheduled(schedule: Schedule) -> Iterator[None]:
    """Kernels that are launched inside run in this order."""
    _schedules.append(schedule)
    try:
        yield
    finally:
        _schedules.pop()


def _standing_in(module: ModuleType, **names: Any) -> ModuleType:
    """A copy of a module with other things by these names."""
    copy = ModuleType(module.__name__)
    copy.__dict__.update({**module.__dict__, **names})
    return copy


def _stand_ins() -> dict[str, ModuleType]:
    barriers = _standing_in(mbarrier, init=_init, wait=_wait, arrive=_arrive, expect=_expect)
    boxes = _standing_in(
        tma,
        **dict.fromkeys(("async_load", "async_copy_global_to_shared"), _load_box),
        **dict.fromkeys(("async_store", "async_copy_shared_to_global"), _store_box),
        store_wait=lambda pendings: machine.wait_stores(int(pendings)),
    )
    on_hopper = _standing_in(
        hopper,
        mbarrier=barriers,
        tma=boxes,
        fence_async_shared=machine.fence,
        warpgroup_mma=_warpgroup_mma,
        warpgroup_mma_init=lambda value: Accumulator(value.data, value.layout),
        warpgroup_mma_wait=_warpgroup_mma_wait,
    )
    on_nvidia = _standing_in(nvidia, hopper=on_hopper)
    gl = _standing_in(
        language,
        nvidia=on_nvidia,
        constexpr=lambda value: value,
        static_range=range,
        static_assert=lambda condition, message="": _assume(condition),
        assume=_assume,
        program_id=lambda axis: current().program.index[axis],
        num_programs=lambda axis: current().program.grid[axis],
        num_warps=lambda: current().program.num_warps,
        cdiv=lambda a, b: (a + b - 1) // b,
        load=load_global,
        store=store_global,
        arange=_arange,
        full=_full,
        zeros=lambda shape, dtype, layout=None: _full(shape, 0, dtype, layout),
        expand_dims=_expand_dims,
        sum=_sum,
        where=_where,
        minimum=_chosen(torch.minimum, min),
        maximum=_chosen(torch.maximum, max),
        convert_layout=_convert_layout,
        inline_asm_elementwise=_inline_asm,
        allocate_shared_memory=_allocate,
        warp_specialize=lambda partitions, warps, registers=None: machine.specialise(partitions, warps),
        barrier=lambda **_: current().step(),
    )
    root = _standing_in(gluon, language=gl, jit=Kernel, constexpr_function=lambda function: function)
    return {module.__name__: module for module in (root, gl, on_nvidia, on_hopper, barriers, boxes)}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a package's modules with texts replaced in them."""

    def __init__(self, package: str, faults: dict[str, tuple[str, str]]) -> None:
        self.package, self.faults = package, faults

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.package and not name.startswith(self.package + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin, self.faults.get(name[len(self.package) + 1 :]))
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, fault: tuple[str, str] | None) -> None:
        super().__init__(name, path)
        self.fault = fault

    def get_code(self, name: str) -> Any:
        source = self.get_source(name)
        assert source is not None
        if self.fault is not None:
            old, new = self.fault
            assert source.count(old) == 1, f"{self.path} holds the text to change {source.count(old)} times"
            source = source.replace(old, new)
        return compile(source, self.path, "exec", dont_inherit=True)


@contextlib.contextmanager
def _replaced(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    parent = sys.modules["triton.experimental"]
    try:
        sys.modules.update(modules)
        parent.gluon = modules["triton.experimental.gluon"]  # type: ignore[attr-defined]
        yield
    finally:
        parent.gluon = gluon  # type: ignore[attr-defined]
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load(package: str, faults: dict[str, tuple[str, str]] | None = None) -> dict[str, ModuleType]:
    """The modules of a package of Gluon kernels by their names in it, over the machine.

    ``faults``: module -> (text that stands once in it, what stands there instead).
    """
    own = [name for name in sys.modules if name == package or name.startswith(package + ".")]
    before = {name: sys.modules.pop(name) for name in own}
    finder = _Finder(package, faults or {})
    holder, _, last = package.rpartition(".")
    importlib.import_module(holder)
    kept = getattr(sys.modules[holder], last, None)
    sys.meta_path.insert(0, finder)
    try:
        with _replaced(_stand_ins()):
            root = importlib.import_module(package)
            for name in {"launch", *finder.faults}:
                importlib.import_module(f"{package}.{name}")
        found = {name: module for name, module in sys.modules.items() if name.startswith(package + ".")}
        return {"": root, **{name[len(package) + 1 :]: module for name, module in found.items()}}
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
            del sys.modules[name]
        sys.modules.update(before)
        if kept is None:
            sys.modules[holder].__dict__.pop(last, None)
        else:
            setattr(sys.modules[holder], last, kept)
