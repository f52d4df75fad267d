"""Take the method out of a model again: merged for inference, switched off, or undone."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.backends.reference import accumulation_dtype
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm
from rlrr_kernels.layers.ownership import check_not_in_fsdp, check_own_parameters, holds_fsdp1, reshard
from rlrr_kernels.models import gained, running
from rlrr_kernels.models.adapt import Base, adapters, head_parameters, replace, trained_norms
from rlrr_kernels.models.wrappers import plain_name, unwrapped
from rlrr_kernels.ops import route

#: A merge that leaves this share of the weights unchanged that the update should change is warned of.
LOST_SHARE = 0.1


@torch.no_grad()
def merge(model: nn.Module, *, safe_merge: bool = False, keep: bool = True) -> nn.Module:
    """Put W' and b + f in the place of W and b in every :class:`FusedRLRRLinear`, in place.

    Inference then costs what the plain model's costs. (The affines after norms cost nothing
    and stay as they are.) W' is formed in float32 and rounded once to the frozen dtype.

    Args:
        safe_merge: first see that all of W', b + f are finite.
        keep: keep W and b, for :func:`unmerge`: a second copy of the weights in memory.

    Returns:
        The same model.

    Raises:
        ValueError: the model holds no adapters; or ``safe_merge`` and a value is not finite:
            nothing is merged then.
        RuntimeError: it is already merged, a frozen weight is computed from other tensors (parametrize, prune), or
            FSDP holds the layers' parameters: nothing is merged then.

    Warns:
        UserWarning: rounding to the frozen dtype undoes the update of more than a tenth of
            the weights, as it does in bfloat16 where u v is small.
    """
    layers = _linears(model)
    if any(layer.merged for _, layer in layers):
        raise RuntimeError("model: it is already merged")
    if not all(layer.enabled for _, layer in layers):
        raise RuntimeError("model: its adapters are switched off, as inside disable_adapter")
    for _, layer in layers:
        check_own_parameters(layer, "merge", "weight", "bias")
        check_not_in_fsdp(layer, "merge")
    if safe_merge:
        _check_finite(model)
    _warn_of_loss(layers)
    for _, layer in layers:
        layer.merge(keep)
    return model


def unmerge(model: nn.Module, base: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Put every frozen W and b back, bit for bit: those kept by :func:`merge`, or those of ``base``.

    Args:
        base: a state dict with the frozen weights under their names in the model, as loaded
            anew; needed after ``merge(keep=False)``. W' is never divided by 1 + u v.

    Raises:
        RuntimeError: the model is not merged, a merged weight is computed from other tensors, or FSDP holds it.
        ValueError: weights were not kept and ``base`` lacks one, or has another shape; nothing is changed then.
    """
    layers = [(name, layer) for name, layer in _linears(model) if layer.merged]
    if not layers:
        raise RuntimeError("model: it is not merged")
    given = base or {}
    for name, layer in layers:
        check_own_parameters(layer, "unmerge", "weight", "bias")
        check_not_in_fsdp(layer, "unmerge")
        if not layer.kept:
            weight = given.get(f"{name}.weight")
            if weight is None:
                raise ValueError(f"base: expected {name}.weight, as merge(keep=False) kept no copy")
            if weight.shape != layer.weight.shape:
                raise ValueError(f"base: expected {name}.weight {list(layer.weight.shape)}, got {list(weight.shape)}")
            bias = given.get(f"{name}.bias") if layer.frozen_bias else None
            if layer.frozen_bias and (bias is None or bias.shape != layer.shift.shape):
                found = "none" if bias is None else list(bias.shape)
                raise ValueError(f"base: expected {name}.bias {list(layer.shift.shape)}, got {found}")
    for name, layer in layers:
        layer.unmerge(given.get(f"{name}.weight"), given.get(f"{name}.bias") if layer.frozen_bias else None)
    return model


@torch.no_grad()
def merge_and_unload(model: nn.Module, *, safe_merge: bool = False) -> nn.Module:
    """Turn the model back into plain modules that compute the same, in place.

    Linears become ``nn.Linear``, LayerNorms absorb their affines, and so does the patch
    embedding's convolution. The state dict has the plain model's keys; a layer that had no bias
    gains one, which is warned of (Swin's ``downsample.reduction``, a bias-less qkv or patch convolution).

    Args:
        safe_merge: first see that every merged value is finite.

    Returns:
        The same model; for a bare adapter its plain twin.

    Raises:
        ValueError: no adapters; or ``safe_merge`` and a value is not finite: nothing is changed then.
        RuntimeError: a tensor of a linear is computed from others (parametrize, prune), or FSDP holds it: nothing is
            changed then.

    Warns:
        UserWarning: as :func:`merge`; or a layer has gained a bias that the library that built the model would not
            build, so that what is saved cannot be loaded there. (Where the config of a transformers model has a switch
            for these biases, it is set instead; what else it governs gets a bias of zero.)
    """
    layers, inner = _linears(model), unwrapped(model)
    for _, layer in layers:
        # the plain module takes over the hooks, by which pruning would go on
        check_own_parameters(layer, "unload", "weight", "bias", "scale_out", "scale_in", "shift")
        check_not_in_fsdp(layer, "unload")
    if safe_merge:
        _check_finite(model)
    _warn_of_loss([(name, layer) for name, layer in layers if not layer.merged])
    if isinstance(inner, FusedRLRRLinear):
        return inner.to_linear()
    if isinstance(inner, SSFLayerNorm):
        return inner.to_layer_norm()
    plain: dict[int, nn.Module] = {}
    new: dict[str, Tensor] = {}
    for name, module in list(inner.named_modules(remove_duplicate=False)):
        if isinstance(module, (FusedRLRRLinear, SSFLayerNorm)):
            if id(module) not in plain:
                plain[id(module)] = (
                    module.to_linear() if isinstance(module, FusedRLRRLinear) else module.to_layer_norm()
                )
            replace(inner, name, plain[id(module)].requires_grad_(False))
            new |= {f"{name}.{leaf}": t for leaf, t in plain[id(module)].named_parameters() if _lacks(module, leaf)}
        elif isinstance(module, SSFAffine):
            where = name.rpartition(".")[0]
            parent: Any = inner.get_submodule(where)
            lacked = parent.proj.bias is None
            parent.proj = _absorb(parent.proj, module)
            replace(inner, name, nn.Identity().train(module.training))
            new |= {f"{where}.proj.bias": parent.proj.bias} if lacked else {}
    base: Base = getattr(inner, "_rlrr_base", Base())
    for name, switch in base.fast_paths.items():
        encoder: Any = inner.get_submodule(name)
        encoder.activation_relu_or_gelu = switch
    for name in ("rlrr_config", "_rlrr_base"):
        if hasattr(inner, name):
            delattr(inner, name)
    running.release(inner)
    gained.settle(inner, new, [name for name, tensor in new.items() if gained.matters(name, tensor)])
    return model


def _lacks(module: FusedRLRRLinear | SSFLayerNorm, leaf: str) -> bool:
    """Whether the frozen layer has no such tensor."""
    if isinstance(module, FusedRLRRLinear) and module.merged:
        return leaf == "bias" and not module.frozen_bias
    return getattr(module, leaf) is None


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is the base model, bit for bit, its head and batch norms included.

    The head is that of the time of :func:`~rlrr_kernels.apply_rlrr`; one that was put in later stays. With
    ``frozen_dtype`` the base model is the one with its weights rounded to that. A merged model is unmerged
    for the time (which needs its copy of the weights).

    Raises:
        ValueError: no adapters.
        RuntimeError: it was merged with ``keep=False``, or a merged weight is computed from other tensors; or FSDP1
            holds the head (FSDP2 may), giving each process a part with no layout that says of what.
    """
    merged = [layer for _, layer in _linears(model) if layer.merged]
    for layer in merged:
        check_own_parameters(layer, "unmerge", "weight", "bias")
        check_not_in_fsdp(layer, "unmerge")
    if not all(layer.kept for layer in merged):
        raise RuntimeError("model: it was merged with keep=False; unmerge it with the base weights first")
    modules = [module for _, module in adapters(model)]
    was_enabled = [module.enabled for module in modules]
    inner: Any = unwrapped(model)
    base: Base = getattr(inner, "_rlrr_base", Base())
    # a model that adds the bias of qkv itself cannot multiply by a weight in another dtype than x
    rounded = getattr(inner, "rlrr_config", None) is not None and inner.rlrr_config.frozen_dtype is not None
    flagged: list[Any] = [] if rounded else [inner.get_submodule(name) for name in base.separate_bias]
    flags = [module.qkv_bias_separate for module in flagged]
    reshard(inner)
    trained: dict[str, Tensor] = dict(head_parameters(inner))
    if (base.head or base.norms) and holds_fsdp1(model):
        raise RuntimeError("model: FSDP1 holds the head, which cannot become that of the base model for a time")
    if {n: p.shape for n, p in trained.items()} != {n: p.shape for n, p in base.head.items()}:
        trained = {}
    norms = {n: t for n, t in trained_norms(inner).items() if n in base.norms and base.norms[n].shape == t.shape}
    changed = [*trained.values(), *norms.values()]
    put_back = [*(base.head[name] for name in trained), *(base.norms[name] for name in norms)]
    now = [tensor.detach().clone() for tensor in changed]
    for layer in merged:
        layer.unmerge()
    try:
        for module in modules:
            module.enabled = False
        for module in flagged:
            module.qkv_bias_separate = False
        _copy(put_back, changed)
        yield model
    finally:
        reshard(inner)
        _copy(now, changed)
        for module, flag in zip(flagged, flags, strict=True):
            module.qkv_bias_separate = flag
        for module, enabled in zip(modules, was_enabled, strict=True):
            module.enabled = enabled
        for layer in merged:
            layer.merge()


@torch.no_grad()
def _copy(values: list[Tensor], tensors: list[Tensor]) -> None:
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(route.laid_out_as(value, tensor))


def _linears(model: nn.Module) -> list[tuple[str, FusedRLRRLinear]]:
    found = list(adapters(unwrapped(model)))
    if not found:
        raise ValueError(f"model: {type(unwrapped(model)).__name__} holds no RLRR adapters")
    return [(plain_name(name), module) for name, module in found if isinstance(module, FusedRLRRLinear)]


def _check_finite(model: nn.Module) -> None:
    for name, module in adapters(model):
        if isinstance(module, FusedRLRRLinear):
            values = (module.weight, module.bias) if module.merged else module.merged_weight()
        elif isinstance(module, SSFLayerNorm):
            plain = module.to_layer_norm()
            values = plain.weight, plain.bias
        else:
            values = module.ssf_scale, module.ssf_shift
        # of a sharded layer all of it: processes that came to different answers would wait for each other
        wholes = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in values)
        if not all(value is None or bool(value.isfinite().all()) for value in wholes):
            raise ValueError(
                f"safe_merge: {name or 'the layer'} would get values that are not finite; nothing is changed"
            )


def _absorb(proj: Any, affine: SSFAffine) -> nn.Module:
    """A patch projection (a convolution, or a linear on flat patches) that applies the affine itself."""
    merged: Any = copy.copy(proj)
    merged._parameters = dict(proj._parameters)
    weight, bias = proj.weight, proj.bias
    wide = accumulation_dtype(weight.dtype)
    scale, shift = affine.ssf_scale.to(wide), affine.ssf_shift.to(wide)
    rows = scale.view(-1, *(1,) * (weight.dim() - 1))
    merged.weight = nn.Parameter((weight.to(wide) * rows).to(weight.dtype), False)
    moved = shift if bias is None else bias.to(wide) * scale + shift
    merged.bias = nn.Parameter(moved.to(weight.dtype, copy=True), False)
    return merged


def _warn_of_loss(layers: list[tuple[str, FusedRLRRLinear]]) -> None:
    shares = []
    lost_of_all = changed_of_all = 0
    for name, layer in layers:
        lost, changed = lost_updates(layer)
        lost_of_all, changed_of_all = lost_of_all + lost, changed_of_all + changed
        shares.append((lost / changed if changed else 0.0, name))
    if lost_of_all > LOST_SHARE * changed_of_all:
        share, name = max(shares)
        warnings.warn(
            f"merging rounds to {layers[0][1].weight.dtype}, which undoes the update of "
            f"{lost_of_all / changed_of_all:.0%} of the weights ({share:.0%} in {name or 'the layer'}); "
            "merge in float32, as after model.float(), to keep it",
            stacklevel=4,
        )


def lost_updates(layer: FusedRLRRLinear) -> tuple[int, int]:
    """(weights that u v should change but that rounding to the stored dtype leaves, weights it should change)."""
    if layer.weight.is_meta:
        return 0, 0
    # of a sharded layer: all of it, in each process
    tensors = layer.merged_weight()[0], layer.weight, layer.scale_out, layer.scale_in
    merged, weight, u, v = (t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)
    update = (u.view(layer.groups, -1, 1) != 0) & (v.view(layer.groups, 1, -1) != 0)
    should = update.view_as(merged) & (weight != 0)
    return int((should & (merged == weight)).sum()), int(should.sum())
