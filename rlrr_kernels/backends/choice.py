"""Which backend serves which pass of which tensors.

``auto`` takes what was measured fastest for the pass at the shape (:mod:`rlrr_kernels.backends.tuned`), else the
first of the backends that are tried for the device type without being asked; in both cases one that can serve the
tensors, and that has not failed ``python -m rlrr_kernels check`` on this device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlrr_kernels.backends import tuned
from rlrr_kernels.backends.problem import Problem

#: name -> (module, device types it is tried for without being asked), best first.
BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("rlrr_kernels.backends.cpu", ("cpu",)),
    "triton": ("rlrr_kernels.backends.triton", ("cuda",)),
    # not yet measured on a GPU: by name, or where it was measured fastest
    "cuda": ("rlrr_kernels.backends.cuda", ()),
    "reference": ("rlrr_kernels.reference", ("cuda", "cpu", "mps", "xpu")),
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


def say_once(name: str, instead: str, why: str | None) -> None:
    """Say once why a preferred backend is :func:`gone`."""
    if why is not None and name not in _warned:
        _warned.add(name)
        warnings.warn(f"rlrr_kernels: backend {name!r} is not available, {instead!r} serves: {why}", stacklevel=2)


class _Served(NamedTuple):
    """A backend, and why it was chosen."""

    name: str
    why: str
    module: ModuleType


class _Plan(NamedTuple):
    """What serves a pass of these dtypes on a device.

    Attributes:
        default: the backend, where nothing was measured.
        measured: name -> others that are named as fastest at some shape, and can serve.
    """

    default: _Served
    measured: dict[str, _Served]


#: (asked for, device, dtype of x, dtype of W, pass) -> what serves it. Only what is settled is kept.
_plans: dict[tuple[str | None, torch.device, torch.dtype, torch.dtype, str], _Plan] = {}


def _plan(asked: str | None, x: Tensor, weight: Tensor, kernel: str) -> _Plan:
    """For tensors of these dtypes on this device."""
    name = _named(asked)
    if name is not None:
        why = refusal(name, x, weight)
        if why is not None:
            raise RuntimeError(
                f"backend {name!r} cannot serve {why}. Leave the choice open "
                "(RLRR_BACKEND=auto, use_backend('auto')) or name another: " + ", ".join(BACKENDS)
            )
        return _Plan(_served(name, "asked for"), {})
    measured: dict[str, _Served] = {}
    refused: list[str] = []

    def fits(name: str) -> bool:
        # in this order: what failed may not even survive being loaded
        if failed(name, x.device) is None and refusal(name, x, weight) is None:
            return True
        if name not in refused:
            refused.append(name)
        return False

    for name in tuned.backends(kernel, x.dtype, weight.dtype, x.device):
        if name in BACKENDS and fits(name):  # else of another version
            measured[name] = _served(name, "measured fastest")
    for name, (_, devices) in BACKENDS.items():
        if x.device.type not in devices or name in refused or not fits(name):
            continue
        for other in refused:
            say_once(other, name, gone(other, x.device))
        whys = [f"{other} {failed(other, x.device) or 'cannot serve it'}" for other in refused]
        if measured.keys() <= {name}:  # nothing to look up at each call
            measured = {}
        return _Plan(_served(name, "; ".join(whys) or f"default for {x.device.type}"), measured)
    return _Plan(_served("reference", f"serves every device, {x.device.type} too"), measured)


def _served(name: str, why: str) -> _Served:
    module = load(name)
    assert not isinstance(module, str), module
    return _Served(name, why, module)


def _chosen(x: Tensor, weight: Tensor, tokens: int, kernel: str, scale_in: Tensor | None) -> _Served:
    asked = _asked()  # once: another thread may enter use_backend meanwhile
    key = (asked, x.device, x.dtype, weight.dtype, kernel)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(asked, x, weight, kernel)
    if not plan.measured:
        return plan.default
    entry = tuned.find(problem_of(x, weight, tokens, kernel, 1 if scale_in is None else scale_in.shape[0]), x.device)
    return plan.default if entry is None else plan.measured.get(entry.backend, plan.default)


def problem_of(x: Tensor, weight: Tensor, tokens: int, kernel: Any, groups: int) -> Problem:
    """A pass of these tensors, x or dy ``[tokens, ...]``, under the setting of TF32 that is in force."""
    # not allow_tf32: reading it raises once the user has set fp32_precision; read where it counts alone, as it is slow
    tf32 = x.dtype is torch.float32 and x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Problem(kernel, tokens, *weight.shape, groups, x.dtype, weight.dtype, tf32)


def module_for(
    x: Tensor, weight: Tensor, tokens: int, kernel: str = "forward", scale_in: Tensor | None = None
) -> ModuleType:
    """The backend that serves a pass, as :func:`explain` names it.

    Args:
        x: x or dy, for its device and dtype.
        weight: W ``[N, K]``.
        tokens: M.
        kernel: the pass, or ``grad_shift``.
        scale_in: v ``[groups, 1, K]``; None for one group.
    """
    return _chosen(x, weight, tokens, kernel, scale_in).module


def backend_for(x: Tensor, weight: Tensor) -> str:
    """Name of the backend that serves these tensors' forward pass: the one asked for, or the best that can.

    Raises ``RuntimeError`` if the one asked for cannot, saying why.
    """
    return explain(x, weight)[0]


def explain(x: Tensor, weight: Tensor, kernel: str = "forward", scale_in: Tensor | None = None) -> tuple[str, str]:
    """As :func:`backend_for` of any pass (x is dy in the two gradients), with the reason for the choice."""
    served = _chosen(x, weight, math.prod(x.shape[:-1]), kernel, scale_in)
    return served.name, served.why
