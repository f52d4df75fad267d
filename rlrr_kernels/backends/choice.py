"""Which backend serves which tensors. The backends are in :data:`rlrr_kernels.backends.BACKENDS`.

``auto`` takes, for each pass, what was measured fastest (:mod:`rlrr_kernels.backends.tuned`), else the first of the
backends that are tried for the device type without being asked; in both cases one that can serve the tensors, and
that has not failed ``python -m rlrr_kernels check`` on this device.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from rlrr_kernels.backends import BACKENDS, LAYER_NORM_BACKENDS, tuned, verdicts
from rlrr_kernels.backends.problem import Pass, Problem, uses_tf32

_forced: str | None = None
_loaded: dict[str, ModuleType | str] = {}
_warned: set[str] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of auto, {', '.join(BACKENDS)}")
    return name


def _asked() -> str | None:
    """The value of ``use_backend`` or else of ``RLRR_BACKEND``, unchecked."""
    forced = _forced
    return forced if forced is not None else os.environ.get("RLRR_BACKEND")


def _named(asked: str | None) -> str | None:
    """The backend that this value names, or None for the default choice."""
    return None if asked in (None, "auto", "") else _checked(asked, "RLRR_BACKEND")


def requested() -> str | None:
    """The backend asked for by ``use_backend`` or ``RLRR_BACKEND``, or None for the default choice."""
    return _named(_asked())


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block, in all threads, on one backend.

    It takes precedence over the environment variable ``RLRR_BACKEND``. A backward pass runs on the backend that is in
    force when it runs. Inside the block an op raises RuntimeError if the backend cannot serve its tensors.

    Args:
        name: ``"cpu"``, ``"gluon"``, ``"triton"``, ``"cuda"``, ``"panels"``, ``"reference"``, or ``"auto"`` for the
            default choice.

    Raises:
        ValueError: If there is no backend of this name.
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


def refusal(name: str, x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """Why the backend cannot serve these tensors at this rank, or None if it can."""
    module = load(name)
    return module if isinstance(module, str) else module.unsupported(x, weight, rank)


@functools.cache
def failed(name: str, device: torch.device, *passes: str) -> str | None:
    """How the backend failed ``python -m rlrr_kernels check`` on this device, or None if it has not failed.

    Args:
        name: the backend.
        device: the device.
        passes: those that count; by default the three of the linear layer.
    """
    subject = "cuda-hopper" if name == "cuda" and os.environ.get("RLRR_CUDA_HOPPER") == "1" else name
    why = verdicts.failure(subject, device, passes or verdicts.PASSES)
    return None if why is None else f"failed its check on this device: {why}"


def unavailable(name: str, device: torch.device) -> str | None:
    """Why the default choice never takes the backend on this device: it failed its check, or cannot be imported."""
    why = failed(name, device)
    if why is not None:
        return why
    module = load(name)
    return module if isinstance(module, str) else None


def warn_once(name: str, instead: str, why: str | None) -> None:
    """Warn, once for each backend, that a preferred backend is unavailable."""
    if why is not None and name not in _warned:
        _warned.add(name)
        warnings.warn(f"rlrr_kernels: backend {name!r} is not available, {instead!r} serves: {why}", stacklevel=2)


@dataclass(frozen=True)
class _Plan:
    """The backends that serve tensors of some dtypes and a rank on a device.

    Attributes:
        name, why, module: the backend for every shape that was not measured, and why it is chosen.
        measured: pass -> the backends that were measured fastest at some shape and can serve these tensors.
    """

    name: str
    why: str
    module: ModuleType
    measured: Mapping[Pass, Mapping[str, ModuleType]] = field(default_factory=dict)


#: (asked for, device, dtype of x, dtype of W, rank) -> its plan. An error is not kept.
_plans: dict[tuple[str | None, torch.device, torch.dtype, torch.dtype, int], _Plan] = {}


def _plan(asked: str | None, x: Tensor, weight: Tensor, rank: int) -> _Plan:
    name = _named(asked)
    if name is not None:
        why = refusal(name, x, weight, rank)
        if why is not None:
            raise RuntimeError(_cannot_serve(name, why))
        return _Plan(name, "asked for", _loaded_module(name))
    refused: list[str] = []
    measured = _measured(x, weight, rank, refused)
    for name, (_, devices) in BACKENDS.items():
        if x.device.type not in devices or name in refused:
            continue
        if _fits(name, x, weight, rank):
            break
        refused.append(name)
    else:
        return _Plan("panels", f"serves every device, {x.device.type} too", _loaded_module("panels"), measured)
    for other in refused:
        warn_once(other, name, unavailable(other, x.device))
    whys = [f"{other} {failed(other, x.device) or 'cannot serve it'}" for other in refused]
    measured = {kernel: found for kernel, found in measured.items() if set(found) != {name}}
    return _Plan(name, "; ".join(whys) or f"default for {x.device.type}", _loaded_module(name), measured)


def _measured(x: Tensor, weight: Tensor, rank: int, refused: list[str]) -> dict[Pass, dict[str, ModuleType]]:
    """The plan's ``measured``, the default backend included; adds the backends that cannot serve to ``refused``."""
    found: dict[Pass, dict[str, ModuleType]] = {}
    for entry in tuned.entries(x.device):
        name = entry.backend
        if (entry.dtype, entry.weight_dtype, entry.rank) != (x.dtype, weight.dtype, rank) or name in refused:
            continue
        if _fits(name, x, weight, rank):
            found.setdefault(entry.kernel, {})[name] = _loaded_module(name)
        else:
            refused.append(name)
    return found


def _fits(name: str, x: Tensor, weight: Tensor, rank: int) -> bool:
    # in this order: a backend that failed may crash when it is loaded
    return failed(name, x.device) is None and refusal(name, x, weight, rank) is None


def _loaded_module(name: str) -> ModuleType:
    module = load(name)
    assert not isinstance(module, str), module
    return module


def _chosen(
    kernel: Pass, x: Tensor, weight: Tensor, tokens: int, groups: int, rank: int
) -> tuple[str, str, ModuleType]:
    asked = _asked()  # read once: another thread may enter use_backend meanwhile
    key = (asked, x.device, x.dtype, weight.dtype, rank)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(asked, x, weight, rank)
    measured = plan.measured.get(kernel)
    if measured:
        tf32 = x.is_cuda and uses_tf32(x.dtype)
        n, k = weight.shape
        entry = tuned.find(Problem(kernel, tokens, n, k, groups, x.dtype, weight.dtype, tf32, rank), x.device)
        if entry is not None and entry.backend in measured:
            return entry.backend, "measured fastest", measured[entry.backend]
    return plan.name, plan.why, plan.module


def module_for(kernel: Pass, x: Tensor, weight: Tensor, tokens: int, groups: int = 1, rank: int = 1) -> ModuleType:
    """The backend that serves a pass over ``tokens`` rows of x (or dy)."""
    return _chosen(kernel, x, weight, tokens, groups, rank)[2]


def module_for_layer_norm(x: Tensor) -> ModuleType:
    """The backend that serves LayerNorm over the last dimension of x ``[..., D]``.

    If the backend that is asked for has no LayerNorm, that is ``reference``.

    Raises:
        RuntimeError: If a backend that is asked for and has one cannot serve x.
    """
    asked = requested()
    for name in LAYER_NORM_BACKENDS if x.numel() else ():
        if name != asked and (asked is not None or x.device.type not in BACKENDS[name][1]):
            continue
        # in this order: a backend that failed may crash when it is loaded
        found = (None if name == asked else failed(name, x.device, "layer_norm")) or load(name)
        why = found if isinstance(found, str) else found.unsupported_layer_norm(x)
        if why is None:
            assert not isinstance(found, str)
            return found
        if name == asked:
            raise RuntimeError(_cannot_serve(name, f"LayerNorm: {why}"))
        if isinstance(found, str):
            warn_once(name, "reference", why)
    return _loaded_module("reference")


def _cannot_serve(name: str, why: str) -> str:
    return (
        f"backend {name!r} cannot serve {why}. Leave the choice open (RLRR_BACKEND=auto, use_backend('auto')) or name "
        f"another: {', '.join(BACKENDS)}"
    )


def backend_for(x: Tensor, weight: Tensor, kernel: Pass = "forward", groups: int = 1, rank: int = 1) -> str:
    """The name of the backend that serves these tensors: the one asked for, or the default choice.

    Args:
        x: ``[..., K]``.
        weight: W ``[N, K]``.
        kernel: ``"forward"``, ``"grad_input"`` or ``"grad_scales"``.
        groups: number of blocks of W's rows that have their own v.
        rank: of u v.

    Raises:
        RuntimeError: If the one asked for cannot serve them.
    """
    return explain(x, weight, kernel, groups, rank)[0]


def explain(x: Tensor, weight: Tensor, kernel: Pass = "forward", groups: int = 1, rank: int = 1) -> tuple[str, str]:
    """The name of the backend that serves these tensors, as :func:`backend_for`, and why it is chosen."""
    return _chosen(kernel, x, weight, math.prod(x.shape[:-1]), groups, rank)[:2]


def reload() -> None:
    """Forget every choice and every file that was read: the next call chooses anew."""
    _plans.clear()
    tuned.reload()
