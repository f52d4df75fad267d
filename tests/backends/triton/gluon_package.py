"""Imports packages of Gluon kernels anew, over the machine of :mod:`gluon_machine`, with planted faults if asked."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from triton import experimental

from tests.backends.triton.gluon_language import stand_ins

#: Text that stands once in a module, and what stands there instead.
Change = tuple[str, str]


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
    """Finds the modules of one package, with texts changed in them; ``changes`` by the names in the package."""

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
    """Inside, neither Gluon nor the package is what it was; after it both are again."""
    before = dict(sys.modules)
    gluon = experimental.gluon
    parent, name = sys.modules[package.rpartition(".")[0]], package.rpartition(".")[2]
    kept = parent.__dict__.get(name)
    for each in [each for each in sys.modules if _within(each, package)]:
        del sys.modules[each]
    sys.modules.update(stand_ins())
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
    """A module of a package, which with all that it imports of it runs over the machine."""
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
