"""What was measured fastest: which backend serves a pass at a shape, and with which tile.

The package's part is ``measured.json`` beside this file; the user's is written by ``rlrr-tune`` and comes first. Both
are :mod:`rlrr_kernels.cachefile` tables of :class:`Entry` objects, read once a process::

    {"device": "NVIDIA H200", "capability": [9, 0], "triton": "3.8.0, ptxas 12.8", "kernels": "0123456789abcdef",
     "pass": "forward", "dtype": "bfloat16", "weight_dtype": "bfloat16", "tf32": false, "n": 768, "k": 3072,
     "groups": 1, "tokens": [12608, 12608], "backend": "triton", "tile": {"block_m": 128, ...}, "measured": {...}}

``device``: a GPU's name, a CPU's architecture and instructions, or ``cpu`` for any. ``capability``, ``triton`` and
``kernels`` (a digest of the kernels' sources) null: whatever is here. ``n``, ``k``, ``groups`` null: any. ``tokens``:
first and last M, null for no last. ``tile`` null: the backend's own choice. ``measured``: for people.

A damaged file, in whole or in part, costs one warning and never a run. ``RLRR_TUNED=0`` switches the user's part off;
``RLRR_TUNED_FILE`` names another file than ``rlrr_kernels/tuned.json`` in the user's cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch

from rlrr_kernels import cachefile
from rlrr_kernels.backends.problem import Pass, Problem
from rlrr_kernels.cachefile import text

#: The version of the file's layout.
FORMAT = 2

#: An entry for one shape serves other M up to this ratio away from its own.
NEAREST = 2**0.5

SHIPPED = Path(__file__).with_name("measured.json")

#: Backends whose kernels Triton compiles.
OF_TRITON = ("triton", "gluon")

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}

#: Files of ``backends/triton`` that no entry's timing depends on: they choose, or belong to LayerNorm.
_NOT_KERNELS = {"__init__.py", "choose.py", "layer_norm.py"}


class Where(NamedTuple):
    """What a measurement holds for; None for whatever is here."""

    device: str
    capability: tuple[int, int] | None
    triton: str | None
    kernels: str | None

    @classmethod
    def of(cls, device: torch.device, backend: str) -> Where:
        """A device, with the Triton and the kernels that are installed for a backend of theirs."""
        compiled = (triton_version(), kernels_digest()) if backend in OF_TRITON else (None, None)
        return cls(device_name(device), _capability(device), *compiled)

    def here(self, device: torch.device) -> bool:
        """Whether it holds for a device of this process."""
        return (
            self.device in (device_name(device), device.type)
            and self.capability in (None, _capability(device))
            and (self.triton is None or self.triton == triton_version())
            and self.kernels in (None, kernels_digest())
        )


def device_name(device: torch.device) -> str:
    """A GPU's name, or a CPU's architecture and the instructions that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def triton_version() -> str:
    """Triton and its ptxas, as ``3.8.0, ptxas 12.8``, with the place of one of the user's; ``none`` without Triton."""
    try:
        import triton
        from triton import knobs
    except ImportError:
        return "none"
    ptxas = knobs.nvidia.ptxas
    own = Path(ptxas.path).is_relative_to(Path(triton.__file__).parent)
    return f"{triton.__version__}, ptxas {ptxas.version}" + ("" if own else f" in {ptxas.path}")


@functools.cache
def kernels_digest(folder: Path = Path(__file__).parent / "triton") -> str:
    """Of the sources that decide how Triton's kernels are compiled and launched: any change of them counts."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if path.name not in _NOT_KERNELS:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """The fastest for one pass at a shape (``n``, ``k``, ``groups`` None: at any) and a band of M.

    Attributes:
        where: what it was measured with.
        kernel, dtype, weight_dtype, tf32, n, k, groups: as in :class:`~rlrr_kernels.backends.problem.Problem`.
        tokens: first and last M of the band; the last may be None.
        backend: its name.
        tile: fields of the backend's choice, or None for the one it makes itself.
        measured: what was written down for people; nothing is decided by it.
    """

    where: Where
    kernel: Pass
    dtype: torch.dtype
    weight_dtype: torch.dtype
    tf32: bool
    n: int | None
    k: int | None
    groups: int | None
    tokens: tuple[int, int | None]
    backend: str
    tile: dict[str, int] | None = field(default=None, hash=False)
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def key(self) -> tuple[object, ...]:
        """What another entry must share to take its place in the file."""
        return self.where, self.kernel, self.dtype, self.weight_dtype, self.tf32, *self._shape, self.tokens

    @property
    def _shape(self) -> tuple[int | None, ...]:
        return self.n, self.k, self.groups

    def distance(self, problem: Problem) -> float | None:
        """How far the problem's M is from the band, as a ratio, 1 within; None where it does not serve it."""
        if any(own not in (None, asked) for own, asked in zip(self._shape, problem[2:5], strict=True)):
            return None
        first, last = self.tokens
        ratio = max(first / problem.m, problem.m / last if last else 0, 1)
        return ratio if ratio == 1 or (self.n is not None and ratio <= NEAREST) else None

    def to_json(self) -> dict[str, Any]:
        """One object of the file."""
        values = {**self.where._asdict(), **self.__dict__, "pass": self.kernel}
        for name in ("dtype", "weight_dtype"):
            values[name] = str(values[name]).removeprefix("torch.")
        return {name: values[name] for name in (*Where._fields, *_FIELDS)}

    def __str__(self) -> str:
        mixed = "" if self.weight_dtype is self.dtype else f" with W {self.weight_dtype}"
        size = "any N and K" if self.n is None else f"N={self.n} K={self.k}"
        groups = "" if self.groups in (None, 1) else f" groups={self.groups}"
        first, last = self.tokens
        band = f"M={first}" if first == last else f"M={first} and more" if last is None else f"M={first} to {last}"
        arithmetic = f"{self.dtype}{mixed}{' as TF32' if self.tf32 else ''}".replace("torch.", "")
        return f"{self.kernel} {arithmetic} {band} {size}{groups}"


_FIELDS = ("pass", "dtype", "weight_dtype", "tf32", "n", "k", "groups", "tokens", "backend", "tile", "measured")


def parse(raw: Any) -> Entry:
    """One entry, every field checked.

    Raises:
        ValueError: the first field that is not as expected.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {raw!r:.40}")
    capability = raw.get("capability")
    if capability is not None and (not isinstance(capability, list) or [type(c) for c in capability] != [int, int]):
        raise ValueError(f"capability: expected two integers or null, got {capability!r:.40}")
    where = Where(
        text(raw, "device"),
        None if capability is None else (capability[0], capability[1]),
        *(None if raw.get(name) is None else text(raw, name) for name in ("triton", "kernels")),
    )
    kernel = _one_of(raw, "pass", get_args(Pass))
    dtype, weight_dtype = (DTYPES[_one_of(raw, name, tuple(DTYPES))] for name in ("dtype", "weight_dtype"))
    if not isinstance(raw.get("tf32"), bool):
        raise ValueError(f"tf32: expected true or false, got {raw.get('tf32')!r:.40}")
    n, k, groups = (None if raw.get(name) is None else _count(raw[name], name) for name in ("n", "k", "groups"))
    if (n is None) != (k is None):
        raise ValueError("n, k: expected both or neither")
    tokens = raw.get("tokens")
    if not isinstance(tokens, list) or len(tokens) != 2:
        raise ValueError(f"tokens: expected the first and the last M, got {tokens!r:.40}")
    first, last = _count(tokens[0], "tokens"), None if tokens[1] is None else _count(tokens[1], "tokens")
    if last is not None and last < first:
        raise ValueError(f"tokens: expected the first M before the last, got {tokens!r:.60}")
    tile, measured = raw.get("tile"), raw.get("measured", {})
    if tile is not None:
        if not isinstance(tile, dict):
            raise ValueError(f"tile: expected an object or null, got {tile!r:.40}")
        tile = {name: _count(value, f"tile.{name:.40}") for name, value in tile.items()}
    if not isinstance(measured, dict):
        raise ValueError(f"measured: expected an object, got {measured!r:.40}")
    shape = kernel, dtype, weight_dtype, raw["tf32"], n, k, groups
    return Entry(where, *shape, (first, last), text(raw, "backend"), tile, measured)


def _one_of(values: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> Any:
    value = values.get(name)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r:.40}")
    return value


def _count(value: Any, name: str) -> int:
    if type(value) is not int or not 1 <= value < 2**40:
        raise ValueError(f"{name}: expected an integer of 1 or more, got {value!r:.40}")
    return value


def default_file() -> Path | None:
    """The user's part: ``RLRR_TUNED_FILE``, else in the user's cache folder; None where there is no home."""
    return cachefile.default_file("RLRR_TUNED_FILE", "tuned.json")


def read(path: Path) -> list[Any]:
    """The raw entries of a file, as :func:`rlrr_kernels.cachefile.read`."""
    return cachefile.read(path, FORMAT)


def users() -> list[Entry]:
    """The user's part, none where it is switched off or missing; what cannot be used is left out with one warning."""
    path = default_file()
    if path is None or os.environ.get("RLRR_TUNED") == "0":
        return []
    missing = "there is no such file, though RLRR_TUNED_FILE names it" if os.environ.get("RLRR_TUNED_FILE") else None
    return cachefile.load(path, read, parse, "left out, the built-in choice stands there", missing)


@functools.cache
def _all() -> tuple[Entry, ...]:
    """The user's, the newest first, then the package's."""
    shipped = cachefile.load(SHIPPED, read, parse, "left out, the built-in choice stands there")
    return (*reversed(users()), *shipped)


@functools.cache
def used(device: torch.device) -> tuple[Entry, ...]:
    """The entries that hold on a device with what is installed, in the order in which they count."""
    return tuple(entry for entry in _all() if entry.where.here(device))


@functools.cache
def _of(kernel: Pass, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> tuple[Entry, ...]:
    asked = kernel, dtype, weight_dtype
    return tuple(entry for entry in used(device) if (entry.kernel, entry.dtype, entry.weight_dtype) == asked)


def backends(kernel: str, dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """The backends that :func:`find` may name at some shape."""
    entries = _of(kernel, dtype, weight_dtype, device) if kernel in get_args(Pass) else ()  # type: ignore[arg-type]
    return tuple(dict.fromkeys(entry.backend for entry in entries))


@functools.lru_cache(maxsize=8192)
def find(problem: Problem, device: torch.device) -> Entry | None:
    """What is known to be fastest, or None: an entry for the shape before one for any, then the nearest band of M."""
    best, least = None, (True, float("inf"))
    for entry in _of(problem.kernel, problem.dtype, problem.weight_dtype, device):
        distance = entry.distance(problem) if entry.tf32 == problem.tf32 else None
        if distance is not None and (entry.n is None, distance) < least:
            best, least = entry, (entry.n is None, distance)
    return best


def reload() -> None:
    """Forget what was read."""
    for cache in (_all, used, _of, find, kernels_digest, triton_version):
        cache.cache_clear()
