"""Selects which modules of a model to adapt: as published for timm's transformer families, or as a config says.

The published code trains ViTs and Swin (RLRR, arXiv 2403.19067); the other families follow the one they are built like.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from rlrr_kernels.layers.norm import SSFLayerNorm
from rlrr_kernels.layers.ownership import check_linear
from rlrr_kernels.models.bypass import first_names
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.modules import plain_name

#: Name of the norm in timm's patch embeddings. The affine after the patch embedding goes there.
PATCH_NORM = "patch_embed.norm"


@dataclass(frozen=True)
class Architecture:
    """What is adapted in a family of models, as shell patterns over module names.

    Attributes:
        linears: ``nn.Linear`` modules to adapt.
        excluded: Those of ``linears`` that stay as they are.
        groups: Pattern over linears to the number of row blocks with a v each.
        norms: ``nn.LayerNorm`` modules that get an affine.
        patch_affine: Whether the patch embedding gets an affine.
    """

    linears: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    groups: Mapping[str, int] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    patch_affine: bool = False


# q, k and v are three layers in the published ViT, and one fused layer in timm's
_VIT = Architecture(
    linears=("blocks.*",),
    groups={"*.attn.qkv": 3},
    norms=("blocks.*", "norm_pre", "norm", "fc_norm"),
    patch_affine=True,
)
# qkv is one layer in the published Swin, which also has no affine after patch embedding and patch merging;
# cpb_mlp computes Swin V2's position biases, not tokens
_SWIN = Architecture(
    linears=("layers.*.blocks.*", "layers.*.downsample.reduction"),
    excluded=("*.cpb_mlp.*",),
    norms=("layers.*.blocks.*.norm[12]", "norm"),
)

#: Class of timm to its architecture. Subclasses (distilled DeiT, ...) follow their base class.
ARCHITECTURES = {
    "timm.models.vision_transformer.VisionTransformer": _VIT,
    "timm.models.eva.Eva": _VIT,
    "timm.models.beit.Beit": _VIT,
    "timm.models.swin_transformer.SwinTransformer": _SWIN,
    "timm.models.swin_transformer_v2.SwinTransformerV2": _SWIN,
}


#: Blocks of timm in which only linear layers read what ``norm1`` and ``norm2`` return.
PRE_NORM_BLOCKS = (
    "timm.models.vision_transformer.Block",
    "timm.models.eva.EvaBlock",
    "timm.models.beit.Block",
    "timm.models.swin_transformer.SwinTransformerBlock",
)


def feeds_only_linears(model: nn.Module, norm: str) -> bool:
    """Return whether only linear layers are known to read the result of the norm of this name."""
    parent, _, leaf = norm.rpartition(".")
    block = type(model.get_submodule(parent))
    return leaf in ("norm1", "norm2") and f"{block.__module__}.{block.__qualname__}" in PRE_NORM_BLOCKS


def architecture_of(model: nn.Module) -> Architecture | None:
    """Return the architecture of a model's class, or None. Does not import timm."""
    for base in type(model).__mro__:
        found = ARCHITECTURES.get(f"{base.__module__}.{base.__qualname__}")
        if found is not None:
            return found
    return None


@dataclass
class Selection:
    """The modules of a model that are to be adapted.

    Attributes:
        linears: Name of each linear to its number of groups.
        norms: Name to module of each norm that gets an affine.
        other_norms: Names of norms that were selected but are no LayerNorms, and stay as they are.
    """

    linears: dict[str, int]
    norms: dict[str, nn.Module]
    other_norms: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [*self.linears, *self.norms]

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            self.linears.pop(name, None)
            self.norms.pop(name, None)


def select(model: nn.Module, config: RLRRConfig, head: nn.Module) -> Selection:
    """Select the modules to adapt, and check that they can be. Changes nothing.

    Args:
        model: The model, without a wrapper.
        config: The config.
        head: The model's head.

    Raises:
        TypeError: If the config names no targets and the model's family is unknown, or if a selected module is of a
            kind that cannot be adapted.
        ValueError: If a pattern matches nothing, if nothing is selected, or if groups do not divide a layer.
    """
    kind = type(model).__name__
    known = architecture_of(model)
    if known is None and config.target_modules is None:
        raise TypeError(
            f"model: expected a ViT, EVA, BEiT or Swin of timm, got {kind}. "
            "For another model name the linears in target_modules"
        )
    published = known if config.target_modules is None else None
    # A layer used in two places has two names. The model itself has none and cannot be replaced in place.
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}

    selection = Selection(
        dict.fromkeys(_select_linears(kind, modules, config, published), 1),
        _select_norms(kind, modules, config, published),
    )
    _apply_exclusions(selection, config.exclude_modules, kind)
    _leave_out_head(selection, head, modules, config.target_modules or ())
    if not selection.linears:
        raise ValueError(
            f"target_modules: they leave no nn.Linear of {kind} to adapt "
            "(those of its head are adapted only where they are named in full)"
        )
    _check_norms(selection)
    groups = config.groups if config.groups is not None else (known.groups if known else {})
    for name in selection.linears:
        try:
            check_linear(modules[name], name)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}. Name it in exclude_modules to leave it as it is") from None
        selection.linears[name] = _group_count(name, modules[name], groups)
    for pattern in config.groups or ():
        if not matching([pattern], selection.linears):
            raise ValueError(f"groups: {pattern!r} matches no adapted nn.Linear of {kind}")
    return selection


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the names that match any of the shell patterns, in their order."""
    patterns = list(patterns)
    return [name for name in names if any(fnmatchcase(plain_name(name), pattern) for pattern in patterns)]


def _select_linears(
    kind: str, modules: Mapping[str, nn.Module], config: RLRRConfig, published: Architecture | None
) -> list[str]:
    # the output projection of nn.MultiheadAttention is of this class; its weight is read and the module never called
    not_called = nn.modules.linear.NonDynamicallyQuantizableLinear
    linears = [name for name, m in modules.items() if isinstance(m, nn.Linear) and type(m) is not not_called]
    if published is not None:
        excluded = set(matching(published.excluded, linears))
        return [name for name in matching(published.linears, linears) if name not in excluded]
    selected: list[str] = []
    for pattern in config.target_modules or ():
        matches = matching([pattern], linears)
        if not matches:
            raise ValueError(f"target_modules: {pattern!r} matches no nn.Linear of {kind}")
        selected += matches
    return selected


def _select_norms(
    kind: str, modules: Mapping[str, nn.Module], config: RLRRConfig, published: Architecture | None
) -> dict[str, nn.Module]:
    norms = [name for name, module in modules.items() if _is_norm(module) and name != PATCH_NORM]
    names: Iterable[str] = ()
    if config.norm_affine is None and published is not None:
        names = matching(published.norms, norms)
    elif config.norm_affine:
        names = norms
    selected = {name: modules[name] for name in names}
    patch_affine = config.patch_affine
    if patch_affine is None:
        patch_affine = published is not None and published.patch_affine
    if patch_affine:
        norm = modules.get(PATCH_NORM, nn.Identity())
        excluded = matching(config.exclude_modules, [PATCH_NORM, "patch_embed"])
        fits = PATCH_NORM in modules and isinstance(norm, (nn.Identity, nn.LayerNorm))
        if not fits and not excluded:
            raise ValueError(
                f"patch_affine: {kind} has no {PATCH_NORM} that is nothing or a LayerNorm; set patch_affine=False"
            )
        selected[PATCH_NORM] = norm
    return selected


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm, or has "Norm" in its class's name and parameters of its own."""
    other = "Norm" in type(module).__name__ and next(module.parameters(recurse=False), None) is not None
    return isinstance(module, nn.LayerNorm) or other


def _apply_exclusions(selection: Selection, patterns: Iterable[str], kind: str) -> None:
    for pattern in patterns:
        excluded = matching([pattern, f"{pattern}.*"], selection.names)
        if not excluded:
            raise ValueError(f"exclude_modules: {pattern!r} matches nothing that would be adapted in {kind}")
        selection.drop(excluded)


def _leave_out_head(
    selection: Selection, head: nn.Module, modules: Mapping[str, nn.Module], targets: Iterable[str]
) -> None:
    """Drop modules of the head, whose weights are new and must train, unless they are named in full."""
    inside = {id(module) for module in head.modules()}
    selection.drop([n for n in selection.names if id(modules.get(n)) in inside and plain_name(n) not in targets])


def _check_norms(selection: Selection) -> None:
    """Move norms that are no LayerNorms to ``other_norms``, and refuse LayerNorms that can have no affine."""
    refused: dict[str, TypeError | ValueError] = {}
    for name, norm in list(selection.norms.items()):
        if isinstance(norm, nn.LayerNorm):
            try:
                SSFLayerNorm.check(norm, name)
            except (TypeError, ValueError) as error:
                refused[name] = error
        elif name != PATCH_NORM:
            selection.other_norms.append(name)
            del selection.norms[name]
    if refused:
        first = next(iter(refused.values()))
        raise type(first)(
            f"{first}. Name {first_names(list(refused))} in exclude_modules to leave it as it is, or set "
            "norm_affine=False"
        )


def _group_count(name: str, linear: Any, groups: Mapping[str, int]) -> int:
    count = next((count for pattern, count in groups.items() if matching([pattern], [name])), 1)
    rows = linear.out_features
    if rows % count:
        raise ValueError(f"groups: {count} does not divide the {rows} rows of {name}")
    return count
