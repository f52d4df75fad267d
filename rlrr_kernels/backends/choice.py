"""Which backend serves which tensors.

``auto`` takes what was measured fastest for the device, dtype and number of tokens
(``measured.json``), else the first of the backends that are tried for the device
type without being asked; in both cases one that can serve the tensors, and that has
not failed ``python -m rlrr_kernels check`` on this device.

``measured.json`` is a list of rules, the first that fits counts::

    {"device": "cpu", "dtype": "float32", "tokens": [1, 512], "backend": "reference", "source": "benchmarks/..."}

``device`` is the name that ``torch.cuda.get_device_name`` gives, or ``cpu``;
``tokens`` the first and last M, null for no limit; ``source`` the committed result
that shows it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: name -> (module, device types it is tried for without being asked), best first.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("rlrr_kernels.backends.cpu", ("cpu",)),
    "gluon": ("rlrr_kernels.backends.triton.gluon", ("cuda",)),
    "triton": ("rlrr_kernels.backends.triton", ("cuda",)),
    # not yet measured on a GPU: by name, or by a rule of measured.json
    "cuda": ("rlrr_kernels.backends.cuda", ()),
    "panels": ("rlrr_kernels.backends.panels", ("cuda", "cpu", "mps", "xpu")),
    # W' whole in each pass: by name alone
    "reference": ("rlrr_kernels.reference", ()),
}

_forced: str | None = None
_loaded: dict[str, ModuleType | str] = {}
_warned: set[str] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of auto, {', '.join(BACKENDS)}")
    return name


def _asked() -> str | None:
    """What ``use_backend`` or else ``RLRR_BACKEND`` says, unchecked."""
    forced = _forced
    return forced if forced is not None else os.environ.get("RLRR_BACKEND")


def _named(asked: str | None) -> str | None:
    """The backend that a request names, or None for a free choice."""
    return None if asked in (None, "auto", "") else _checked(asked, "RLRR_BACKEND")


def requested() -> str | None:
    """The backend asked for by ``use_backend`` or ``RLRR_BACKEND``, or None for a free choice."""
    return _named(_asked())


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block, in all threads, on one backend.

    ``name``: ``"cpu"``, ``"triton"``, ``"cuda"``, ``"reference"`` or ``"auto"`` (the
    default choice). It takes precedence over the environment variable
    ``RLRR_BACKEND``. Backward runs on whatever is in force when it runs. Raises
    ``ValueError`` for another name; an op raises ``RuntimeError`` where the named
    backend cannot serve its tensors.
    """
    global _forced
    if name != "auto":
        _checked(name, "use_backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def load(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported here."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(BACKENDS[name][0])
        except ImportError as error:
            _loaded[name] = f"it cannot be imported: {error}"
    return _loaded[name]


def refusal(name: str, x: Tensor, weight: Tensor) -> str | None:
    """Why the backend cannot serve these tensors, or None if it can."""
    module = load(name)
    return module if isinstance(module, str) else module.unsupported(x, weight)


@functools.cache
def failed(name: str, device: torch.device, *passes: str) -> str | None:
    """Why no free choice takes the backend here: how it failed its check on this device; None where it did not.

    ``passes``: those that count, by default the three of the linear layer. Read once a process.
    """
    # not at import: the package's other parts come after this one
    from rlrr_kernels.check import record

    subject = "cuda-hopper" if name == "cuda" and os.environ.get("RLRR_CUDA_HOPPER") == "1" else name
    why = record.failure(subject, device, passes or record.PRODUCTS)
    return None if why is None else f"failed its check on this device: {why}"


def gone(name: str, device: torch.device) -> str | None:
    """Why a free choice takes the backend for no tensors of this device: :func:`failed`, or not here; else None."""
    why = failed(name, device)
    if why is not None:
        return why
    module = load(name)
    return module if isinstance(module, str) else None


@functools.cache
def _rules(device: str, dtype: str) -> tuple[dict[str, Any], ...]:
    rules = json.loads(resources.files("rlrr_kernels.backends").joinpath("measured.json").read_text())
    return tuple(rule for rule in rules if rule["device"] == device and rule["dtype"] == dtype)


@functools.cache
def _device_name(kind: str, index: int | None) -> str:
    return torch.cuda.get_device_name(index) if kind == "cuda" else kind


def say_once(name: str, instead: str, why: str | None) -> None:
    """Say once why a preferred backend is :func:`gone`."""
    if why is not None and name not in _warned:
        _warned.add(name)
        warnings.warn(f"rlrr_kernels: backend {name!r} is not available, {instead!r} serves: {why}", stacklevel=2)


#: Every number of tokens, as a rule writes it.
_ALL = (0, math.inf)

#: (asked for, device, dtype of x, dtype of W) -> what serves which numbers of tokens. Only what is settled is kept.
_plans: dict[tuple[str | None, torch.device, torch.dtype, torch.dtype], tuple[_Entry, ...]] = {}


@dataclass(frozen=True)
class _Entry:
    """A backend for a range of tokens, and why it was chosen. The first entry that fits counts."""

    tokens: tuple[float, float]
    name: str
    why: str
    module: ModuleType


def _plan(asked: str | None, x: Tensor, weight: Tensor) -> tuple[_Entry, ...]:
    """Entries for tensors of these dtypes on this device; the last one takes every number of tokens."""
    name = _named(asked)
    if name is not None:
        why = refusal(name, x, weight)
        if why is not None:
            raise RuntimeError(
                f"backend {name!r} cannot serve {why}. Leave the choice open "
                "(RLRR_BACKEND=auto, use_backend('auto')) or name another: " + ", ".join(BACKENDS)
            )
        return (_entry(_ALL, name, "asked for"),)
    entries = []
    refused: list[str] = []

    def fits(name: str) -> bool:
        # in this order: what failed may not even survive being loaded
        if failed(name, x.device) is None and refusal(name, x, weight) is None:
            return True
        if name not in refused:
            refused.append(name)
        return False

    for rule in _rules(_device_name(x.device.type, x.device.index), str(x.dtype).removeprefix("torch.")):
        if fits(rule["backend"]):
            first, last = rule["tokens"]
            tokens = (first or 0, math.inf if last is None else last)
            entries.append(_entry(tokens, rule["backend"], "measured fastest"))
    for name, (_, devices) in BACKENDS.items():
        if x.device.type not in devices or name in refused or not fits(name):
            continue
        for other in refused:
            say_once(other, name, gone(other, x.device))
        whys = [f"{other} {failed(other, x.device) or 'cannot serve it'}" for other in refused]
        why = "; ".join(whys) or f"default for {x.device.type}"
        return (*entries, _entry(_ALL, name, why))
    return (*entries, _entry(_ALL, "panels", f"serves every device, {x.device.type} too"))


def _entry(tokens: tuple[float, float], name: str, why: str) -> _Entry:
    module = load(name)
    assert not isinstance(module, str), module
    return _Entry(tokens, name, why, module)


def _chosen(x: Tensor, weight: Tensor, tokens: int) -> _Entry:
    asked = _asked()  # once: another thread may enter use_backend meanwhile
    key = (asked, x.device, x.dtype, weight.dtype)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(asked, x, weight)
    return next(entry for entry in plan if entry.tokens[0] <= tokens <= entry.tokens[1])


def module_for(x: Tensor, weight: Tensor, tokens: int) -> ModuleType:
    """The backend that serves a product of this many rows of x, as :func:`backend_for` names it."""
    return _chosen(x, weight, tokens).module


def backend_for(x: Tensor, weight: Tensor) -> str:
    """Name of the backend that serves these tensors: the one asked for, or the best that can.

    Raises ``RuntimeError`` if the one asked for cannot, saying why.
    """
    return explain(x, weight)[0]


def explain(x: Tensor, weight: Tensor) -> tuple[str, str]:
    """As :func:`backend_for`, with the reason for the choice."""
    entry = _chosen(x, weight, math.prod(x.shape[:-1]))
    return entry.name, entry.why
