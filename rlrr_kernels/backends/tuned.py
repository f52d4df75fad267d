"""What was measured: which backend serves a pass, and in which tile. ``auto`` reads it here; ``rlrr-tune`` writes it.

Two files of one format: ``measured.json`` beside this module, which is shipped, and the user's::

    {"format": 2, "entries": [{"device": "NVIDIA H200", "where": {...}, "pass": "forward", "dtype": "bfloat16",
      "weight_dtype": "bfloat16", "tf32": false, "layer": [2304, 768, 3], "tokens": [8916, 17830], "backend": "triton",
      "tile": {"block_m": 256, ...}, "measured": {...}}, ...]}

``where`` is what a measurement holds for (:class:`rlrr_kernels.backends.verdicts.Where`): with another driver, torch,
Triton or build the entry is not used. In the shipped file it is null, and holds for the device. ``layer`` is N, K and
groups, or null for all; ``tokens`` the first and last M, null for no end. Of the entries that fit, one for the layer
comes before one for all, then the one whose middle is nearest to M, by ratio.

The user's file is read once a process, at the first lookup. A damaged one, in whole or in part, costs one warning.
``RLRR_TUNED=0`` switches it off; ``RLRR_TUNED_FILE`` names another than ``rlrr_kernels/tuned.json`` in the user's
cache folder.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from rlrr_kernels.backends.problem import Pass, Problem

if TYPE_CHECKING:
    from rlrr_kernels.backends.verdicts import Where

#: The version of the files' layout.
FORMAT = 2

SHIPPED = Path(__file__).with_name("measured.json")

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Entry:
    """What serves a pass of some layers; the fields are the file's.

    Attributes:
        measured: what the tuner wrote down for people; nothing is decided by it.
    """

    device: str
    where: Where | None
    kernel: Pass
    dtype: torch.dtype
    weight_dtype: torch.dtype
    tf32: bool
    layer: tuple[int, int, int] | None
    tokens: tuple[int, float]
    backend: str
    tile: Mapping[str, int] | None = None
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> object:
        """What another entry takes the place of this one by."""
        return self.device, self.where, self.kernel, self.dtype, self.weight_dtype, self.tf32, self.layer, self.tokens

    def __str__(self) -> str:
        types = dict.fromkeys(str(t).removeprefix("torch.") for t in (self.dtype, self.weight_dtype))
        layer = "any N and K" if self.layer is None else "N={} K={} groups={}".format(*self.layer)
        tokens = "{} and more tokens" if math.isinf(self.tokens[1]) else "{} to {} tokens"
        arithmetic = " with W ".join(types) + (" as TF32" if self.tf32 else "")
        return f"{self.kernel}, {arithmetic}, {layer}, {tokens.format(*self.tokens)}"

    def serves(self, problem: Problem) -> bool:
        """Whether it was measured for such problems."""
        types = (problem.kernel, problem.dtype, problem.weight_dtype, problem.tf32)
        layer = (problem.n, problem.k, problem.groups)
        return (
            types == (self.kernel, self.dtype, self.weight_dtype, self.tf32)
            and self.layer in (None, layer)
            and self.tokens[0] <= problem.m <= self.tokens[1]
        )

    def distance(self, m: int) -> float:
        """Of the middle of its tokens from m, as the logarithm of their ratio."""
        return abs(math.log(max(m, 1)) - (math.log(max(self.tokens[0], 1)) + math.log(self.tokens[1])) / 2)

    def to_json(self) -> dict[str, Any]:
        """One object of the file."""
        return {
            "device": self.device,
            "where": None if self.where is None else self.where._asdict(),
            "pass": self.kernel,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "tf32": self.tf32,
            "layer": None if self.layer is None else list(self.layer),
            "tokens": [self.tokens[0], None if math.isinf(self.tokens[1]) else self.tokens[1]],
            "backend": self.backend,
            "tile": None if self.tile is None else dict(self.tile),
            "measured": dict(self.measured),
        }


def parse(raw: Any) -> Entry:
    """One entry, every field checked.

    Raises:
        ValueError: the first field that is not as expected.
    """
    from rlrr_kernels.backends.choice import BACKENDS
    from rlrr_kernels.backends.verdicts import Where
    from rlrr_kernels.io import cache  # not at import: the package's other parts come after this one

    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {raw!r:.40}")
    where = raw.get("where")
    if where is not None:
        if not isinstance(where, dict) or set(where) != set(Where._fields):
            raise ValueError(f"where: expected {', '.join(Where._fields)}, got {where!r:.40}")
        where = Where(**{name: cache.text(where, name) for name in Where._fields})
    first, last = _numbers(raw, "tokens", 2, end=True)
    layer = None if raw.get("layer") is None else _numbers(raw, "layer", 3)
    if layer is not None and layer[0] % layer[2]:
        raise ValueError(f"layer: expected groups that divide N = {layer[0]}, got {layer[2]}")
    if last < first:
        raise ValueError(f"tokens: expected a first and a last, got {[first, last]}")
    tile = raw.get("tile")
    if tile is not None and (
        not isinstance(tile, dict) or any(type(value) is not int or not 0 <= value <= 2**20 for value in tile.values())
    ):
        raise ValueError(f"tile: expected whole numbers by name, or null, got {tile!r:.80}")
    measured = raw.get("measured", {})
    if not isinstance(measured, dict):
        raise ValueError(f"measured: expected an object, got {measured!r:.40}")
    return Entry(
        cache.text(raw, "device"),
        where,
        _one_of(raw, "pass", get_args(Pass)),
        _DTYPES[_one_of(raw, "dtype", _DTYPES)],
        _DTYPES[_one_of(raw, "weight_dtype", _DTYPES)],
        _one_of(raw, "tf32", (False, True)),
        layer,  # type: ignore[arg-type]
        (int(first), last),
        _one_of(raw, "backend", BACKENDS),
        tile,
        measured,
    )


def _one_of(raw: Mapping[str, Any], name: str, known: Iterable[Any]) -> Any:
    value = raw.get(name)
    if not isinstance(value, str | bool) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r:.40}")
    return value


def _numbers(raw: Mapping[str, Any], name: str, count: int, end: bool = False) -> tuple[float, ...]:
    values = raw.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {values!r:.40}")
    if end and values[-1] is None:
        values = [*values[:-1], math.inf]
    if any(value != math.inf and (type(value) is not int or not 1 <= value < 2**40) for value in values):
        raise ValueError(f"{name}: expected whole numbers of 1 or more, got {values!r:.40}")
    return tuple(values)


def default_file() -> Path | None:
    """Where the user's choices are kept: ``RLRR_TUNED_FILE``, else in the cache folder; None where there is no home."""
    from rlrr_kernels.io import cache  # not at import: the package's other parts come after this one

    return cache.default_file("RLRR_TUNED_FILE", "tuned.json")


def read(path: Path) -> list[Any]:
    """The raw entries of a file, as :func:`rlrr_kernels.io.cache.read`."""
    from rlrr_kernels.io import cache  # not at import: the package's other parts come after this one

    return cache.read(path, FORMAT)


def add(path: Path, entries: Iterable[Entry]) -> Path | None:
    """Put entries into a file, in place of those for the same; as :func:`rlrr_kernels.io.cache.add`."""
    from rlrr_kernels.io import cache  # not at import: the package's other parts come after this one

    return cache.add(path, FORMAT, {entry.key: entry.to_json() for entry in entries}, _key_of)


def _key_of(raw: Any) -> object:
    try:
        return parse(raw).key
    except ValueError:
        return None


@functools.cache
def shipped() -> tuple[Entry, ...]:
    """Those of the package."""
    return tuple(parse(raw) for raw in read(SHIPPED))


def of_user() -> tuple[Entry, ...]:
    """Those of the file in use, none where it is switched off or missing.

    What cannot be used is left out with one warning that names the file and the first reason.
    """
    from rlrr_kernels.io import cache

    path = default_file()
    if path is None or os.environ.get("RLRR_TUNED") == "0":
        return ()
    missing = "there is no such file, though RLRR_TUNED_FILE names it" if os.environ.get("RLRR_TUNED_FILE") else None
    return tuple(cache.load(path, read, parse, "left out, the defaults serve there", missing))


_loading = threading.Lock()
_entries: dict[torch.device, tuple[Entry, ...]] = {}


def _renew_lock() -> None:
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):  # a child inherits the lock of a thread that it lacks, locked for ever
    os.register_at_fork(after_in_child=_renew_lock)


def entries(device: torch.device) -> tuple[Entry, ...]:
    """Those that hold for a device as it is now, the user's first."""
    found = _entries.get(device)
    if found is None:
        with _loading:  # backward has threads of its own
            if device not in _entries:
                _entries[device] = tuple(entry for entry in (*_user(), *shipped()) if holds(entry, device))
            found = _entries[device]
    return found


@functools.cache
def _user() -> tuple[Entry, ...]:
    return of_user()


def holds(entry: Entry, device: torch.device) -> bool:
    """Whether it was measured on such a device, with what is installed."""
    if entry.where is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return entry.device == name
    from rlrr_kernels.backends.verdicts import Where

    return entry.where.subject == entry.backend and entry.where == Where.of(entry.backend, device)


@functools.lru_cache(maxsize=8192)
def find(problem: Problem, device: torch.device) -> Entry | None:
    """The entry for a problem, or None where nothing was measured. Remembered by argument."""
    found = [entry for entry in entries(device) if entry.serves(problem)]
    return min(found, key=lambda entry: (entry.layer is None, entry.distance(problem.m)), default=None)


def reload() -> None:
    """Forget what was read: the next lookup reads the file and the environment anew."""
    _entries.clear()
    _user.cache_clear()
    find.cache_clear()
