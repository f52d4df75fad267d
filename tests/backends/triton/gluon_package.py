"""Imports a package of Gluon kernels so that it runs on :mod:`gluon_machine`, with planted faults on request."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor
from triton import experimental
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.backends.triton.gluon_language import Boxes, Number, Pointer, stand_ins
from tests.backends.triton.gluon_machine import Program, Schedule

#: A text that occurs once in a module, and its replacement.
Change = tuple[str, str]


@dataclass(eq=False)
class Kernel:
    """What ``gluon.jit`` returns: a function for other kernels, and ``kernel[(programs,)](...)`` for the host."""

    fn: Callable[..., Any]

    def __post_init__(self) -> None:
        self.__name__ = self.fn.__name__
        self.arg_names = list(inspect.signature(self.fn).parameters)

    def __call__(self, *args: Any, **constants: Any) -> Any:
        return self.fn(*args, **constants)

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def launch(*args: Any, num_warps: int, **constants: Any) -> None:
            given = [_on_device(a) for a in (*args, *(constants[name] for name in self.arg_names[len(args) :]))]
            schedule = _schedules[-1]
            for index in reversed(range(*grid)) if schedule.backwards else range(*grid):
                Program(index, *grid, schedule).run(self.fn, given)

        return launch


def _jit(fn: Callable[..., Any] | None = None, do_not_specialize: Sequence[str] = ()) -> Any:
    return Kernel if fn is None else Kernel(fn)


def _on_device(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Pointer(argument)
    if type(argument) is int:
        return Number(argument)
    if isinstance(argument, TensorDescriptor):
        matrix = argument.base.as_strided(argument.shape, argument.strides, argument.base.storage_offset())
        return Boxes(matrix, list(argument.block_shape), argument.layout)
    return argument


_schedules = [Schedule()]


@contextlib.contextmanager
def scheduled(schedule: Schedule) -> Iterator[None]:
    """Kernels that are launched inside the block run in this order."""
    _schedules.append(schedule)
    try:
        yield
    finally:
        _schedules.pop()


class _Loader(importlib.abc.ExecutionLoader):
    def __init__(self, path: str, change: Change | None) -> None:
        self.path, self.change = path, change

    def get_filename(self, fullname: str) -> str:
        return self.path

    def get_source(self, fullname: str) -> str:
        source = Path(self.path).read_text()
        if self.change is not None:
            old, new = self.change
            assert source.count(old) == 1, f"{self.path} holds the text to change {source.count(old)} times"
            source = source.replace(old, new)
        return source


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one package; ``changes`` holds, by module name, the text to change in it."""

    def __init__(self, package: str, changes: dict[str, Change]) -> None:
        self.package, self.changes = package, changes

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if not _within(fullname, self.package):
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None:
            return None
        loader = _Loader(found.origin, self.changes.get(fullname.removeprefix(self.package + ".")))
        places = found.submodule_search_locations
        return importlib.util.spec_from_file_location(
            fullname, found.origin, loader=loader, submodule_search_locations=places
        )


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@contextlib.contextmanager
def _imported_anew(package: str) -> Iterator[None]:
    """Inside the block the package can be imported again, over stand-ins for Gluon; afterwards both are restored."""
    before = dict(sys.modules)
    gluon = experimental.gluon
    parent, name = sys.modules[package.rpartition(".")[0]], package.rpartition(".")[2]
    kept = parent.__dict__.get(name)
    for each in [each for each in sys.modules if _within(each, package)]:
        del sys.modules[each]
    sys.modules.update(stand_ins(_jit))
    experimental.gluon = sys.modules[gluon.__name__]
    try:
        yield
    finally:
        for each in [each for each in sys.modules if _within(each, package)]:
            del sys.modules[each]
        sys.modules.update({each: module for each, module in before.items() if sys.modules.get(each) is not module})
        experimental.gluon = gluon
        parent.__dict__.pop(name, None)
        if kept is not None:
            setattr(parent, name, kept)


def load(package: str, module: str, changes: dict[str, Change] | None = None) -> ModuleType:
    """Import a module of a package, and what it imports from the package, to run on the machine."""
    importlib.import_module(package.rpartition(".")[0])
    finder = _Finder(package, changes or {})
    with _imported_anew(package):
        sys.meta_path.insert(0, finder)
        try:
            loaded = importlib.import_module(f"{package}.{module}")
        finally:
            sys.meta_path.remove(finder)
        missing = [name for name in finder.changes if f"{package}.{name}" not in sys.modules]
        assert not missing, f"{package}.{module} does not import {missing}"
    return loaded
