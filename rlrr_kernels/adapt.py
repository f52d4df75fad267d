"""Put the layer into a whole model, say what trains, and take it out again."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rlrr_kernels.linear import FusedRLRRLinear, Init

#: Every linear inside the blocks of a timm VisionTransformer; the head is none of them.
VIT_TARGETS = ("blocks.*",)


def apply_rlrr(
    model: nn.Module,
    target_modules: Sequence[str] | None = None,
    *,
    init: Init = "paper",
    train_head: bool = True,
) -> nn.Module:
    """Replace linears by :class:`FusedRLRRLinear`, in place; freeze the rest but the head.

    Args:
        model: a timm ``VisionTransformer``, or any module if ``target_modules`` is given.
        target_modules: names of ``nn.Linear`` modules, or shell patterns over names
            (``"blocks.*.mlp.fc1"``). Default: all linears in a ViT's blocks. A module
            whose own name is ``qkv`` gets three groups: a v each for q, k and v, as in
            the published code, where they are three layers.
        init: see :class:`FusedRLRRLinear`.
        train_head: leave what ``model.get_classifier()`` returns trainable.

    Returns:
        The same model. Only u, v, f of each replaced layer, and the head, need gradients.

    Raises:
        TypeError: no ``target_modules`` for a model that is no timm ``VisionTransformer``.
        ValueError: a pattern in ``target_modules`` matches no ``nn.Linear``, the model
            already holds a :class:`FusedRLRRLinear`, or it has classes and no head to train.
    """
    if any(isinstance(module, FusedRLRRLinear) for module in model.modules()):
        raise ValueError("model: it already holds FusedRLRRLinear layers; apply_rlrr goes on a plain model")
    if target_modules is None:
        target_modules = VIT_TARGETS
        if not _is_timm_vit(model):
            raise TypeError(
                f"model: expected a timm VisionTransformer, got {type(model).__name__}. For another "
                "model name the linears in target_modules, and check that its code calls them as "
                "modules: SwinV2, BEiT and EVA02 read qkv.weight directly, which leaves u, v, f unused"
            )
    elif isinstance(target_modules, str):
        target_modules = (target_modules,)
    # a layer used in two places has two names; the model itself has none and cannot be replaced in place
    modules = list(model.named_modules(remove_duplicate=False))
    linears = {name: module for name, module in modules if name and type(module) is nn.Linear}
    chosen: dict[str, nn.Linear] = {}
    for pattern in target_modules:
        matches = {name: module for name, module in linears.items() if fnmatchcase(name, pattern)}
        if not matches:
            raise ValueError(f"target_modules: {pattern!r} matches no nn.Linear of {type(model).__name__}")
        chosen |= matches

    if train_head and getattr(model, "num_classes", None) and next(head(model).parameters(), None) is None:
        raise ValueError(f"train_head: {type(model).__name__}.get_classifier() gives no head with parameters")
    model.requires_grad_(False)
    layers: dict[int, FusedRLRRLinear] = {}
    for name, linear in chosen.items():
        if id(linear) not in layers:
            groups = 3 if name.rpartition(".")[2] == "qkv" else 1
            layers[id(linear)] = FusedRLRRLinear.from_linear(linear, groups=groups, init=init)
        _replace(model, name, layers[id(linear)])
    if train_head:
        for module in head(model).modules():
            if not isinstance(module, FusedRLRRLinear):
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(True)
    return model


def _is_timm_vit(model: nn.Module) -> bool:
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError:
        return False
    return isinstance(model, VisionTransformer)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def head(model: nn.Module) -> nn.Module:
    """What ``model.get_classifier()`` returns (timm's convention), several heads as one list; or an empty module."""
    get = getattr(model, "get_classifier", None)
    classifier = get() if callable(get) else None
    if isinstance(classifier, (tuple, list)):
        return nn.ModuleList(classifier)
    return classifier if isinstance(classifier, nn.Module) else nn.Identity()


def merge_model(model: nn.Module) -> nn.Module:
    """Replace each :class:`FusedRLRRLinear` by the plain ``nn.Linear`` it amounts to, in place.

    Weights are formed in float32 and rounded once to their stored dtype. The result
    has no cost left at inference, and the architecture's usual state-dict keys (a
    layer that had no bias gains one: f).

    Returns:
        The same model; for a bare :class:`FusedRLRRLinear` its plain twin.
    """
    if isinstance(model, FusedRLRRLinear):
        return model.merged()
    merged: dict[int, nn.Linear] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FusedRLRRLinear):
            if id(module) not in merged:
                merged[id(module)] = module.merged()
            _replace(model, name, merged[id(module)])
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters train, of how many, as PEFT does."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups that decay u, v and other weights, and leave f, biases and norms alone.

    The published code decays u, v and the head's weight. A rule by dimension, as
    timm's, agrees for these shapes only by luck; this one goes by what a parameter is.

    Returns:
        Two groups for a ``torch.optim`` optimiser, trainable parameters only.
    """
    plain: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_scale = isinstance(module, FusedRLRRLinear) and name in ("scale_out", "scale_in")
            if not is_scale and (parameter.ndim <= 1 or name in ("bias", "shift", "cls_token", "pos_embed")):
                plain.add(id(parameter))
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in plain], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in plain], "weight_decay": 0.0},
    ]
