"""The three ops, their fakes, and which backend serves them.

A backend is a module with four functions and no knowledge of modules, autocast
or autograd (shapes as in :mod:`rlrr_kernels.reference`)::

    forward(x, weight, scale_out, scale_in, bias, shift) -> y
    grad_input(dy, weight, scale_out, scale_in) -> dx
    grad_scales(dy, x, weight, scale_out, scale_in, need_shift) -> (du, dv, df)
    unsupported(x, weight) -> why it cannot serve these tensors, or None

To add one, write that module and add its line to ``_BACKENDS``. The choice is
made when an op runs, behind the dispatcher, so ``torch.compile`` neither sees
nor guards on it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from rlrr_kernels.reference import accumulation_dtype

#: name -> (module, device types it is tried for without being asked), best first.
_BACKENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "triton": ("rlrr_kernels.backends.triton", ("cuda",)),
    "reference": ("rlrr_kernels.reference", ("cuda", "cpu", "mps", "xpu")),
}

_forced: str | None = None
_loaded: dict[str, ModuleType | str] = {}


def _checked(name: str, source: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, expected one of auto, {', '.join(_BACKENDS)}")
    return name


def _requested() -> str | None:
    """The backend asked for by ``use_backend`` or ``RLRR_BACKEND``, or None for a free choice."""
    if _forced is not None:
        return None if _forced == "auto" else _forced
    name = os.environ.get("RLRR_BACKEND", "auto")
    return None if name in ("auto", "") else _checked(name, "RLRR_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block, in all threads, on one backend.

    ``name``: ``"triton"``, ``"reference"`` or ``"auto"`` (the default choice). It
    takes precedence over the environment variable ``RLRR_BACKEND``. Backward runs
    on whatever is in force when it runs. Raises ``ValueError`` for another name;
    an op raises ``RuntimeError`` where the named backend cannot serve its tensors.
    """
    global _forced
    if name != "auto":
        _checked(name, "use_backend")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _load(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported here."""
    if name not in _loaded:
        try:
            _loaded[name] = importlib.import_module(_BACKENDS[name][0])
        except ImportError as error:
            _loaded[name] = f"it cannot be imported: {error}"
    return _loaded[name]


def _refusal(name: str, x: Tensor, weight: Tensor) -> str | None:
    module = _load(name)
    return module if isinstance(module, str) else module.unsupported(x, weight)


def backend_for(x: Tensor, weight: Tensor) -> str:
    """Name of the backend that serves these tensors: the one asked for, or the first that can.

    Raises ``RuntimeError`` if the one asked for cannot, saying why.
    """
    name = _requested()
    if name is not None:
        refusal = _refusal(name, x, weight)
        if refusal is not None:
            raise RuntimeError(
                f"backend {name!r} cannot serve {refusal}. Leave the choice open "
                "(RLRR_BACKEND=auto, use_backend('auto')) or name another: " + ", ".join(_BACKENDS)
            )
        return name
    for name, (_, devices) in _BACKENDS.items():
        if x.device.type in devices and _refusal(name, x, weight) is None:
            return name
    return "reference"


def _backend(x: Tensor, weight: Tensor) -> ModuleType:
    # a product with an empty side has no work for a kernel, only a shape and zeros
    if x.numel() == 0 or weight.numel() == 0:
        name = "reference"
    else:
        name = backend_for(x, weight)
    module = _load(name)
    assert not isinstance(module, str)
    return module


_library = torch.library.Library("rlrr", "DEF")
_library.define(
    "forward(Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, Tensor? bias, Tensor? shift) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "grad_input(Tensor dy, Tensor weight, Tensor scale_out, Tensor scale_in) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "grad_scales(Tensor dy, Tensor x, Tensor weight, Tensor scale_out, Tensor scale_in, bool need_shift)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    return _backend(x, weight).forward(x, weight, scale_out, scale_in, bias, shift)


def _grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    return _backend(dy, weight).grad_input(dy, weight, scale_out, scale_in)


def _grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _backend(x, weight).grad_scales(dy, x, weight, scale_out, scale_in, need_shift)


for _name, _implementation in (("forward", _forward), ("grad_input", _grad_input), ("grad_scales", _grad_scales)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


@torch.library.register_fake("rlrr::forward", lib=_library)
def _(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("rlrr::grad_input", lib=_library)
def _(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    return dy.new_empty((dy.shape[0], weight.shape[1]))


@torch.library.register_fake("rlrr::grad_scales", lib=_library)
def _(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    du = x.new_empty(scale_out.shape, dtype=wide)
    dv = x.new_empty(scale_in.shape, dtype=wide)
    return du, dv, x.new_empty((weight.shape[0] if need_shift else 0,), dtype=wide)


forward = torch.ops.rlrr.forward.default
grad_input = torch.ops.rlrr.grad_input.default
grad_scales = torch.ops.rlrr.grad_scales.default
