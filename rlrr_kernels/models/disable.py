"""``disable_adapter``: an adapted model computes as its base model for a time; and what is kept for that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.layers.ownership import holds_fsdp1, reshard
from rlrr_kernels.models import running_stats
from rlrr_kernels.models.modules import adapted_linears, adapters, head, head_parameters, unwrapped
from rlrr_kernels.ops import route


@dataclass
class BaseState:
    """What the base model has that its adapted one changes, besides the adapters themselves.

    Attributes:
        head: Copies of the head's trained parameters.
        norms: Copies of the tensors of norms that train, by full name.
        separate_bias: Names of attention modules whose ``qkv_bias_separate`` was set.
        fast_paths: Name of each ``nn.TransformerEncoderLayer`` to what the switch of its fast path was.
    """

    head: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    separate_bias: list[str] = field(default_factory=list)
    fast_paths: dict[str, int] = field(default_factory=dict)


def remember_base(model: nn.Module) -> None:
    """Keep copies of the head and of the norms that train, as they are now, for :func:`disable_adapter`."""
    trained = {name: p for name, p in head_parameters(model).items() if p.requires_grad}
    base: Any = model
    base._rlrr_base.head = {name: p.detach().clone() for name, p in trained.items() if not p.is_meta}
    base._rlrr_base.norms = {name: t.detach().clone() for name, t in _norm_tensors(model).items() if not t.is_meta}


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Make the model its base model inside the block, bit for bit, including its head and batch norms.

    The head is the one from when :func:`~rlrr_kernels.apply_rlrr` was called; a head that was put in later stays. With
    ``frozen_dtype`` the base model is the one with weights rounded to that dtype. A merged model is unmerged inside
    the block, which needs its copy of the weights.

    Args:
        model: The adapted model.

    Yields:
        The same model.

    Raises:
        ValueError: If the model holds no adapters.
        RuntimeError: If it was merged with ``keep=False``, a merged weight is computed from other tensors, or FSDP1
            holds the head. (FSDP2 may: its tensors say which part each process has.)
    """
    merged = [layer for _, layer in adapted_linears(model) if layer.merged]
    for layer in merged:
        layer.check_unmerge()
    if not all(layer.kept for layer in merged):
        raise RuntimeError("model: it was merged with keep=False; unmerge it with the base weights first")
    inner: Any = unwrapped(model)
    base: BaseState = getattr(inner, "_rlrr_base", BaseState())
    if (base.head or base.norms) and holds_fsdp1(model):
        raise RuntimeError("model: FSDP1 holds the head, which cannot become that of the base model for a time")
    modules = [module for _, module in adapters(model)]
    was_enabled = [module.enabled for module in modules]
    # a model that adds the bias of qkv itself cannot multiply by a weight in another dtype than x
    rounded = getattr(inner, "rlrr_config", None) is not None and inner.rlrr_config.frozen_dtype is not None
    attention: list[Any] = [] if rounded else [inner.get_submodule(name) for name in base.separate_bias]
    was_separate = [module.qkv_bias_separate for module in attention]
    reshard(inner)
    changed, base_values = _trained_tensors(inner, base)
    trained_values = [tensor.detach().clone() for tensor in changed]
    for layer in merged:
        layer._unmerge()
    try:
        for module in modules:
            module.enabled = False
        for module in attention:
            module.qkv_bias_separate = False
        _copy(base_values, changed)
        yield model
    finally:
        reshard(inner)
        _copy(trained_values, changed)
        for module, separate in zip(attention, was_separate, strict=True):
            module.qkv_bias_separate = separate
        for module, enabled in zip(modules, was_enabled, strict=True):
            module.enabled = enabled
        for layer in merged:
            layer.merge()


def _norm_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of norms that train, and the trained parameters of those outside the head."""
    in_head = {id(parameter) for parameter in head(model).parameters()}
    norms = dict(running_stats.trained_norms(model))
    tensors = running_stats.statistics(norms.items())
    for name, module in norms.items():
        own = module.named_parameters(name, recurse=False)
        tensors |= {full: p for full, p in own if p.requires_grad and id(p) not in in_head}
    return tensors


def _trained_tensors(model: nn.Module, base: BaseState) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of head and norms that differ from the base model's, and their values there."""
    head_now = head_parameters(model)
    if {name: p.shape for name, p in head_now.items()} != {name: p.shape for name, p in base.head.items()}:
        head_now = {}  # another head was put in
    norms = _norm_tensors(model)
    kept = [name for name, value in base.norms.items() if name in norms and norms[name].shape == value.shape]
    now = [*head_now.values(), *(norms[name] for name in kept)]
    return now, [*(base.head[name] for name in head_now), *(base.norms[name] for name in kept)]


@torch.no_grad()
def _copy(values: list[Tensor], tensors: list[Tensor]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(route.laid_out_as(value, tensor))
