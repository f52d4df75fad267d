"""The three ops and their fakes.

A backend is a module with four functions and no knowledge of modules, autocast
or autograd (shapes as in :mod:`rlrr_kernels.reference`)::

    forward(x, weight, scale_out, scale_in, bias, shift) -> y
    grad_input(dy, weight, scale_out, scale_in) -> dx
    grad_scales(dy, x, weight, scale_out, scale_in, need_shift) -> (du, dv, df)
    unsupported(x, weight) -> why it cannot serve these tensors, or None

To add one, write that module and add its line to the table in
:mod:`rlrr_kernels.backends.choice`. The choice is made when an op runs, behind the
dispatcher, so ``torch.compile`` neither sees nor guards on it.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rlrr_kernels.backends import choice
from rlrr_kernels.reference import accumulation_dtype


def _backend(x: Tensor, weight: Tensor) -> ModuleType:
    # a product with an empty side has no work for a kernel, only a shape and zeros
    if x.numel() == 0 or weight.numel() == 0:
        name = "reference"
    else:
        name = choice.backend_for(x, weight)
    module = choice.load(name)
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
