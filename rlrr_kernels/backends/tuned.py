"""Measured choices: the fastest backend and tile for a pass. ``auto`` reads them here; ``rlrr-tune`` writes them.

There are two files of one format: ``measured.json`` beside this module, which is shipped, and the user's::

    {"format": 2, "entries": [{"device": "NVIDIA H200", "where": {...}, "pass": "forward", "dtype": "bfloat16",
      "weight_dtype": "bfloat16", "tf32": false, "rank": 1, "layer": [2304, 768, 3], "tokens": [8916, 17830],
      "backend": "triton", "tile": {"block_m": 256, ...}, "measured": {...}}, ...]}

``where`` says what a measurement is valid for (:class:`rlrr_kernels.backends.verdicts.Where`): with another driver,
torch, Triton or build the entry is not used. In the shipped file it is null: valid for the device. Without
``rank`` it is 1. ``layer`` is N, K and groups, or null for all layers; ``tokens`` is the first and last M, null for no
end. Of the entries that fit, those
for the layer come before those for all layers, then the one whose middle is nearest to M, by ratio.

The user's file is read once per process, at the first lookup. A damaged file or entry causes one warning and is
ignored. ``RLRR_TUNED=0`` ignores the file; ``RLRR_TUNED_FILE`` names another file than ``rlrr_kernels/tuned.json`` in
the user's cache folder.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from rlrr_kernels.backends import BACKENDS
from rlrr_kernels.backends.problem import MAX_RANK, Pass, Problem
from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.io import cache
from rlrr_kernels.io.checks import expect, expect_one_of, expect_text

#: The format of both files.
FORMAT = 2

SHIPPED = Path(__file__).with_name("measured.json")

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclass(frozen=True)
class Entry:
    """The choice for a pass of some layers, as in the file.

    Attributes:
        measured: The tuner's figures, for people only.
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
    rank: int = 1

    @property
    def key(self) -> object:
        """A new entry replaces the one with the same key."""
        types = self.dtype, self.weight_dtype, self.tf32
        return self.device, self.where, self.kernel, *types, self.rank, self.layer, self.tokens

    def __str__(self) -> str:
        types = dict.fromkeys(str(t).removeprefix("torch.") for t in (self.dtype, self.weight_dtype))
        layer = "any N and K" if self.layer is None else "N={} K={} groups={}".format(*self.layer)
        tokens = "{} and more tokens" if math.isinf(self.tokens[1]) else "{} to {} tokens"
        arithmetic = " with W ".join(types) + (" as TF32" if self.tf32 else "")
        rank = "" if self.rank == 1 else f" rank={self.rank}"
        return f"{self.kernel}, {arithmetic}, {layer}{rank}, {tokens.format(*self.tokens)}"

    def serves(self, problem: Problem) -> bool:
        """Whether the entry is valid for a problem."""
        types = (problem.kernel, problem.dtype, problem.weight_dtype, problem.tf32, problem.rank)
        layer = (problem.n, problem.k, problem.groups)
        return (
            types == (self.kernel, self.dtype, self.weight_dtype, self.tf32, self.rank)
            and self.layer in (None, layer)
            and self.tokens[0] <= problem.m <= self.tokens[1]
        )

    def distance(self, m: int) -> float:
        """Logarithm of the ratio between m and the middle of the entry's tokens."""
        return abs(math.log(max(m, 1)) - (math.log(max(self.tokens[0], 1)) + math.log(self.tokens[1])) / 2)

    def to_json(self) -> dict[str, Any]:
        """The entry as an object of the file."""
        return {
            "device": self.device,
            "where": None if self.where is None else self.where._asdict(),
            "pass": self.kernel,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weight_dtype": str(self.weight_dtype).removeprefix("torch."),
            "tf32": self.tf32,
            "rank": self.rank,
            "layer": None if self.layer is None else list(self.layer),
            "tokens": [self.tokens[0], None if math.isinf(self.tokens[1]) else self.tokens[1]],
            "backend": self.backend,
            "tile": None if self.tile is None else dict(self.tile),
            "measured": dict(self.measured),
        }


def parse(raw: Any) -> Entry:
    """Check every field of one object of the file.

    Raises:
        ValueError: If a field is not as expected; names the first.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {raw!r:.40}")
    where = expect(raw, "where", dict, type(None))
    if where is not None:
        if set(where) != set(Where._fields):
            raise ValueError(f"where: expected {', '.join(Where._fields)}, got {where!r:.40}")
        where = Where(**{name: expect_text(where, name) for name in Where._fields})
    first, last = _integers(raw, "tokens", 2, end=True)
    layer = None if raw.get("layer") is None else _integers(raw, "layer", 3)
    if layer is not None and layer[0] % layer[2]:
        raise ValueError(f"layer: expected groups that divide N = {layer[0]}, got {layer[2]}")
    if last < first:
        raise ValueError(f"tokens: expected a first and a last, got {[first, last]}")
    rank = expect({"rank": 1, **raw}, "rank", int)
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank: expected 1 to {MAX_RANK}, got {rank}")
    tile = expect(raw, "tile", dict, type(None))
    if tile is not None and any(type(value) is not int or not 0 <= value <= 2**20 for value in tile.values()):
        raise ValueError(f"tile: expected integers by name, or null, got {tile!r:.80}")
    return Entry(
        expect_text(raw, "device"),
        where,
        expect_one_of(raw, "pass", get_args(Pass)),  # type: ignore[arg-type]
        _DTYPES[expect_one_of(raw, "dtype", _DTYPES)],
        _DTYPES[expect_one_of(raw, "weight_dtype", _DTYPES)],
        expect(raw, "tf32", bool),
        layer,  # type: ignore[arg-type]
        (int(first), last),
        expect_one_of(raw, "backend", BACKENDS),
        tile,
        expect({"measured": {}, **raw}, "measured", dict),
        rank,
    )


def _integers(raw: Mapping[str, Any], name: str, count: int, end: bool = False) -> tuple[float, ...]:
    """Return ``raw[name]`` if it is ``count`` integers of 1 or more; with ``end``, null as the last is infinity."""
    values = raw.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name}: expected {count} numbers, got {values!r:.40}")
    if end and values[-1] is None:
        values = [*values[:-1], math.inf]
    if any(value != math.inf and (type(value) is not int or not 1 <= value < 2**40) for value in values):
        raise ValueError(f"{name}: expected integers of 1 or more, got {values!r:.40}")
    return tuple(values)


def default_file() -> Path | None:
    """Path of the user's file: ``RLRR_TUNED_FILE``, else in the cache folder; None if there is no home folder."""
    return cache.default_file("RLRR_TUNED_FILE", "tuned.json")


def read(path: Path) -> list[Any]:
    """As :func:`rlrr_kernels.io.cache.read`."""
    return cache.read(path, FORMAT)


def add(path: Path, entries: Iterable[Entry]) -> Path | None:
    """As :func:`rlrr_kernels.io.cache.add`."""
    return cache.add(path, FORMAT, entries, parse)


@functools.cache
def shipped() -> tuple[Entry, ...]:
    """The entries of ``measured.json``."""
    return tuple(parse(raw) for raw in read(SHIPPED))


def of_user() -> tuple[Entry, ...]:
    """The entries of the user's file, as :func:`rlrr_kernels.io.cache.load`; none if it is switched off or missing."""
    path = default_file()
    if path is None or os.environ.get("RLRR_TUNED") == "0":
        return ()
    missing = "there is no such file, though RLRR_TUNED_FILE names it" if os.environ.get("RLRR_TUNED_FILE") else None
    return tuple(cache.load(path, FORMAT, parse, "left out, the defaults serve there", missing))


_loading = threading.Lock()
_entries: dict[torch.device, tuple[Entry, ...]] = {}


def _renew_lock() -> None:
    global _loading
    _loading = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread may hold the lock at a fork, and does not run in the child
    os.register_at_fork(after_in_child=_renew_lock)


def entries(device: torch.device) -> tuple[Entry, ...]:
    """The entries that are valid for a device, the user's first."""
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
    """Whether an entry is valid for a device and the installed versions."""
    if entry.where is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return entry.device == name
    return entry.where.subject == entry.backend and entry.where == Where.of(entry.backend, device)


@functools.lru_cache(maxsize=8192)
def find(problem: Problem, device: torch.device) -> Entry | None:
    """The entry for a problem, or None if nothing was measured. Cached."""
    found = [entry for entry in entries(device) if entry.serves(problem)]
    return min(found, key=lambda entry: (entry.layer is None, entry.distance(problem.m)), default=None)


def reload() -> None:
    """Clear all caches: the next lookup reads the file and the environment again."""
    _entries.clear()
    _user.cache_clear()
    find.cache_clear()
