"""Takes the method out of a model: merged for inference and back, or replaced by plain modules."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels.backends.reference import accumulation_dtype
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm
from rlrr_kernels.layers.ownership import check_not_in_fsdp, check_own_parameters
from rlrr_kernels.models import running_stats
from rlrr_kernels.models.disable import BaseState
from rlrr_kernels.models.modules import adapted_linears, adapters, plain_name, replace, unwrapped
from rlrr_kernels.ops.route import whole

#: A merge warns if rounding undoes the update of more than this share of the weights.
LOST_SHARE = 0.1

#: What to do about biases that a merge adds to layers without one.
ADDED_BIAS_REMEDY = (
    "keep the merged model itself (torch.save), or give those layers a bias before such a file is loaded"
)


@torch.inference_mode(False)
@torch.no_grad()
def merge(model: nn.Module, *, safe_merge: bool = False, keep: bool = True) -> nn.Module:
    """Put W' and b + f in the place of W and b in every :class:`FusedRLRRLinear`, in place.

    Inference then costs what the plain model's costs. The affines after norms stay as they are: they cost nothing. W'
    is formed in float32 and rounded once to the frozen dtype.

    Args:
        model: The adapted model.
        safe_merge: First check that all merged values are finite.
        keep: Keep W and b for :func:`unmerge`: a second copy of the weights in memory.

    Returns:
        The same model.

    Raises:
        ValueError: If the model holds no adapters, or with ``safe_merge`` a value is not finite. Nothing is merged.
        RuntimeError: If the model is already merged, its adapters are switched off, a frozen weight is computed from
            other tensors (parametrize, prune), or FSDP manages the layers' parameters. Nothing is merged.

    Warns:
        UserWarning: If rounding to the frozen dtype undoes the update of more than a tenth of the weights, as it does
            in bfloat16 where u v is small.
    """
    layers = adapted_linears(model)
    if any(layer.merged for _, layer in layers):
        raise RuntimeError("model: it is already merged")
    if not all(layer.enabled for _, layer in layers):
        raise RuntimeError("model: its adapters are switched off, as inside disable_adapter")
    for _, layer in layers:
        layer.check_merge()
    _check_values(model, safe_merge)
    for _, layer in layers:
        layer._merge(keep)
    return model


def unmerge(model: nn.Module, base: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Put every frozen W and b back, bit for bit: those that :func:`merge` kept, or those of ``base``.

    Args:
        model: The merged model.
        base: A state dict that holds the frozen weights under their names in the model, loaded anew. Needed after
            ``merge(keep=False)``: W' is never divided by 1 + u v.

    Returns:
        The same model.

    Raises:
        RuntimeError: If the model is not merged, a merged weight is computed from other tensors, or FSDP manages it.
        ValueError: If weights were not kept and ``base`` lacks one, or has one of another shape. Nothing is changed.
    """
    layers = [(name, layer) for name, layer in adapted_linears(model) if layer.merged]
    if not layers:
        raise RuntimeError("model: it is not merged")
    given = base or {}
    for name, layer in layers:
        layer.check_unmerge()
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
        layer._unmerge(given.get(f"{name}.weight"), given.get(f"{name}.bias") if layer.frozen_bias else None)
    return model


@torch.inference_mode(False)
@torch.no_grad()
def merge_and_unload(model: nn.Module, *, safe_merge: bool = False) -> nn.Module:
    """Turn an adapted model back into plain modules that compute the same, in place.

    Linears become ``nn.Linear``; LayerNorms and the patch embedding's convolution absorb their affines. The state dict
    has the plain model's keys. A layer that had no bias gets one (Swin's ``downsample.reduction``, a qkv or patch
    convolution without bias).

    Args:
        model: The adapted model.
        safe_merge: First check that all merged values are finite.

    Returns:
        The same model. If ``model`` is an adapter itself, the plain module that computes the same.

    Raises:
        ValueError: If the model holds no adapters, or with ``safe_merge`` a value is not finite. Nothing is changed.
        RuntimeError: If a tensor of a linear is computed from others (parametrize, prune), or FSDP manages it. Nothing
            is changed.

    Warns:
        UserWarning: As :func:`merge`; or if a layer gets a bias that the model's library would not build, so that it
            cannot load what is saved. If the config of a transformers model has a switch for these biases, it is set
            instead, and the other layers that it governs get a bias of zero.
    """
    layers, inner = adapted_linears(model), unwrapped(model)
    for _, layer in layers:
        # the plain module takes over the hooks, with which pruning would go on
        check_own_parameters(layer, "unload", "weight", "bias", "scale_out", "scale_in", "shift")
        check_not_in_fsdp(layer, "unload")
    _check_values(model, safe_merge)
    if isinstance(inner, FusedRLRRLinear | SSFLayerNorm):
        return _to_plain(inner)
    plain: dict[int, nn.Module] = {}  # by identity: a layer that is used in two places stays one layer
    added: dict[str, Tensor] = {}
    for name, module in list(inner.named_modules(remove_duplicate=False)):
        if isinstance(module, FusedRLRRLinear | SSFLayerNorm):
            if id(module) not in plain:
                plain[id(module)] = _to_plain(module)
            replace(inner, name, plain[id(module)].requires_grad_(False))
            added |= {f"{name}.{leaf}": t for leaf, t in plain[id(module)].named_parameters() if _lacks(module, leaf)}
        elif isinstance(module, SSFAffine):
            place = name.rpartition(".")[0]
            patch_embed: Any = inner.get_submodule(place)
            lacks_bias = patch_embed.proj.bias is None
            patch_embed.proj = _absorb(patch_embed.proj, module)
            replace(inner, name, nn.Identity().train(module.training))
            added |= {f"{place}.proj.bias": patch_embed.proj.bias} if lacks_bias else {}
    base: BaseState = getattr(inner, "_rlrr_base", BaseState())
    for name, switch in base.fast_paths.items():
        encoder: Any = inner.get_submodule(name)
        encoder.activation_relu_or_gelu = switch
    for name in ("rlrr_config", "_rlrr_base"):
        if hasattr(inner, name):
            delattr(inner, name)
    running_stats.unfreeze(inner)
    needed = [name for name, tensor in added.items() if has_effect(name, tensor)]
    if needed and not _enable_in_config(inner, set(added)):
        first, *others = needed
        more = f" and {len(others)} more tensors" if others else ""
        warnings.warn(
            f"merging gave {first}{more} to layers that had none, to hold what was trained. {type(inner).__name__}, as "
            "its library builds it, has no such tensor: from_pretrained, or load_state_dict with strict=False, drops "
            f"it without an error; {ADDED_BIAS_REMEDY}",
            stacklevel=4,
        )
    return model


def lost_updates(layer: FusedRLRRLinear, merged: Tensor) -> tuple[int, int]:
    """Count the weights whose update is lost when W' is rounded to the stored dtype.

    Args:
        layer: The layer, not merged.
        merged: W' ``[N, K]`` in the stored dtype.

    Returns:
        (weights that u v should change and that stay as they were, weights that u v should change).
    """
    if layer.weight.is_meta:
        return 0, 0
    merged, weight, u, v = map(whole, (merged, layer.weight, layer.scale_out, layer.scale_in))
    used_u, used_v = (u != 0).float().view(layer.groups, -1, layer.rank), (v != 0).float()
    update = (used_u @ used_v.view(layer.groups, layer.rank, -1)).view_as(merged) > 0
    should_change = update & (weight != 0)
    return int((should_change & (merged == weight)).sum()), int(should_change.sum())


def has_effect(name: str, tensor: Tensor) -> bool:
    """Return whether an added bias has a value other than 0, or an added weight of a norm one other than 1."""
    if tensor.is_meta:
        return False
    return bool((whole(tensor) != (1 if name.endswith("weight") else 0)).any())


def _check_values(model: nn.Module, safe_merge: bool) -> None:
    """Form the merged values of each adapter once, and check them.

    Of sharded layers whole tensors are checked: processes that came to different results would wait for each other.

    Raises:
        ValueError: If ``safe_merge`` is set and a value is not finite.

    Warns:
        UserWarning: If rounding undoes more than :data:`LOST_SHARE` of the updates.
    """
    lost_total = changed_total = 0
    shares: list[tuple[float, str, torch.dtype]] = []
    for name, module in adapters(unwrapped(model)):
        name = plain_name(name) or "the layer"
        values: tuple[Tensor | None, ...] = ()
        if isinstance(module, FusedRLRRLinear):
            values = (module.weight, module.bias) if module.merged else module.merged_weight()
            if not module.merged:
                lost, changed = lost_updates(module, values[0])
                lost_total, changed_total = lost_total + lost, changed_total + changed
                shares.append((lost / changed if changed else 0.0, name, module.weight.dtype))
        elif safe_merge and isinstance(module, SSFLayerNorm):
            norm = module.to_layer_norm()
            values = norm.weight, norm.bias
        elif safe_merge:
            values = module.ssf_scale, module.ssf_shift
        if safe_merge and not all(value is None or bool(whole(value).isfinite().all()) for value in values):
            raise ValueError(f"safe_merge: {name} would get values that are not finite; nothing is changed")
    if lost_total > LOST_SHARE * changed_total:
        share, name, _ = max(shares, key=lambda each: each[:2])
        warnings.warn(
            f"merging rounds to {shares[0][2]}, which undoes the update of {lost_total / changed_total:.0%} of the "
            f"weights ({share:.0%} in {name}); merge in float32, as after model.float(), to keep it",
            stacklevel=5,
        )


def _to_plain(module: FusedRLRRLinear | SSFLayerNorm) -> nn.Module:
    return module.to_linear() if isinstance(module, FusedRLRRLinear) else module.to_layer_norm()


def _lacks(module: FusedRLRRLinear | SSFLayerNorm, leaf: str) -> bool:
    """Return whether the frozen layer has no tensor of this name."""
    if isinstance(module, FusedRLRRLinear) and module.merged:
        return leaf == "bias" and not module.frozen_bias
    return getattr(module, leaf) is None


def _absorb(proj: Any, affine: SSFAffine) -> nn.Module:
    """Return a patch projection (a convolution, or a linear on flat patches) that applies the affine itself."""
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


def _enable_in_config(model: Any, added: set[str]) -> bool:
    """Set the switches in a transformers model's config with which its class builds the added biases.

    Other layers that a switch governs get a bias of zero.

    Args:
        model: The plain model.
        added: Full names of the tensors that the merge added.

    Returns:
        Whether the class now builds all of the added tensors. If not, nothing is changed.
    """
    transformers = sys.modules.get("transformers")  # a model of theirs has imported it
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    off = [name for name, value in vars(model.config).items() if value is False and "bias" in name]
    try:
        before = _tensor_names(model, [])
        switches = [name for name in off if (_tensor_names(model, [name]) - before) & added]
        built = _tensor_names(model, switches)
    except Exception:  # the class cannot be built from its config alone
        return False
    linears = {f"{name}.bias": m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is None}
    governed = built - before - added
    if not (before | added <= built and governed <= linears.keys()):
        return False
    for name in switches:
        setattr(model.config, name, True)
    for name in governed:
        weight = linears[name].weight
        linears[name].bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=False)
    return True


def _tensor_names(model: Any, switches: list[str]) -> set[str]:
    """Return the state dict's keys of a model of this class with the given switches of its config set."""
    config = copy.deepcopy(model.config)
    for name in switches:
        setattr(config, name, True)
    with torch.device("meta"):
        return set(type(model)(config).state_dict())
