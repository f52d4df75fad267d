"""Finds parts of a model: what is inside a wrapper, its adapters and its head; and replaces modules by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm
from rlrr_kernels.layers.ownership import under_fsdp

#: The modules of this package that hold trained parameters. Each has the switch ``enabled``.
Adapter = FusedRLRRLinear | SSFLayerNorm | SSFAffine

#: Names of classification heads in timm, torchvision and transformers: first the usual ones, then those of distilled
#: and segmentation models and of auxiliary losses. ``lm_head`` is not here: it is pretrained with its model.
HEAD_NAMES = (
    *("classifier", "head", "heads", "fc", "score"),
    *("head_dist", "dist_head", "cls_classifier", "distillation_classifier", "classifier_distill"),
    *("classification_head", "segmentation_head", "decode_head", "qa_outputs"),
    *("auxiliary_head", "aux_classifier", "aux1", "aux2", "AuxLogits"),
)

#: Classes of transformers that return ``config.num_labels`` logits. The configs of all other classes have that
#: field too.
_LABELLED = re.compile(r"For\w*(Classification|Segmentation|Detection|QuestionAnswering)")

#: Attributes in which ``nn.Module`` keeps the hooks that run around its forward and backward pass.
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper, ``DataParallel`` and ``DistributedDataParallel``."""
    parallel = nn.parallel.DataParallel, nn.parallel.DistributedDataParallel
    while True:
        inner = model.module if isinstance(model, parallel) else model._modules.get("_orig_mod")
        if inner is None:
            return model
        model = inner


def plain_name(name: str) -> str:
    """Return the name that a module or parameter had before ``torch.compile`` wrapped a module around it."""
    return name.replace("_orig_mod.", "")


def check_not_distributed(model: nn.Module) -> None:
    """Check that neither DDP nor FSDP manages the parameters of the model or of one of its modules.

    DDP reduces the gradients of the parameters that it was given, and FSDP puts its own back at each pass.

    Raises:
        TypeError: If one of them does.
    """
    for module in model.modules():
        ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        if ddp or under_fsdp(module):
            raise TypeError(
                f"model: {'DistributedDataParallel' if ddp else 'FSDP'} has taken over its parameters; adapt the plain "
                "model (apply_rlrr, load_adapter), and wrap or shard it then"
            )


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield (name, module) of each adapter; a module that is used in two places comes once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def adapted_linears(model: nn.Module) -> list[tuple[str, FusedRLRRLinear]]:
    """Return (name, module) of each :class:`FusedRLRRLinear`.

    Raises:
        ValueError: If the model holds no adapters of any kind.
    """
    found = list(adapters(unwrapped(model)))
    if not found:
        raise ValueError(f"model: {type(unwrapped(model)).__name__} holds no RLRR adapters")
    return [(plain_name(name), module) for name, module in found if isinstance(module, FusedRLRRLinear)]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at a full name. It takes over the hooks of the module that was there."""
    parent, _, leaf = name.rpartition(".")
    replaced = vars(model.get_submodule(name))
    # the dicts themselves, so that handles of these hooks can still remove them
    vars(module).update({hooks: replaced[hooks] for hooks in _HOOKS})
    setattr(model.get_submodule(parent), leaf, module)


def head(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """Return the head of a model, which is new for each task.

    That is what ``model.get_classifier()`` returns (timm's convention), else the child modules with parameters whose
    names are in :data:`HEAD_NAMES`. If a model only wraps another one, the inner model is searched.

    Args:
        model: The model, without a wrapper (see :func:`unwrapped`).
        names: Names of the head's modules, or shell patterns over full names; empty to search for the head. None:
            as ``train_head`` says in the config of a model that :func:`~rlrr_kernels.apply_rlrr` has adapted.

    Returns:
        The one module; or an ``nn.ModuleList`` of several, or of none.

    Raises:
        ValueError: If a name matches no module with parameters.
    """
    if names is None:
        config = getattr(model, "rlrr_config", None)
        names = () if config is None else config.head_names
    found = _named_head(model, names) if names else _search_head(model)
    return found[0] if len(found) == 1 else nn.ModuleList(found)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return {name within the head: parameter}, without the parameters of adapters."""
    return {
        f"{place}.{leaf}".removeprefix("."): parameter
        for place, module in head(model).named_modules()
        if not isinstance(module, Adapter)
        for leaf, parameter in module.named_parameters(recurse=False)
    }


def check_head(model: nn.Module, found: nn.Module) -> None:
    """Check that a model which says that it has classes has a head.

    Args:
        model: The model.
        found: What :func:`head` returned for it.

    Raises:
        ValueError: If the model has classes, but ``found`` has no parameters.
    """
    count = _class_count(model)
    if count and not _has_parameters(found):
        raise ValueError(
            f"train_head: {type(model).__name__} has {count} classes, but no head was found: get_classifier() gives "
            f"none with parameters, and none is called {', '.join(HEAD_NAMES[:4])} or {HEAD_NAMES[4]}. Name its "
            'modules, as in train_head=["decoder.last"], or pass train_head=False if nothing in it is new'
        )


def _named_head(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = [(plain_name(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    found: dict[int, nn.Module] = {}
    for pattern in names:
        matches = [m for name, m in modules if name and fnmatchcase(name, pattern) and _has_parameters(m)]
        if not matches:
            raise ValueError(f"train_head: {pattern!r} matches no module with parameters of {type(model).__name__}")
        found |= {id(module): module for module in matches}
    return list(found.values())


def _search_head(model: nn.Module) -> list[nn.Module]:
    for level in _nested_models(model):
        get_classifier = getattr(level, "get_classifier", None)
        classifier = get_classifier() if callable(get_classifier) else None
        if isinstance(classifier, (nn.Module, tuple, list)):
            modules = [classifier] if isinstance(classifier, nn.Module) else classifier
            return [module for module in modules if isinstance(module, nn.Module)]
        found = [module for name, module in level.named_children() if name in HEAD_NAMES and _has_parameters(module)]
        if found:
            return found
    return []


def _class_count(model: nn.Module) -> int | None:
    """Return how many classes a model says it has, or None."""
    for level in _nested_models(model):
        counts = [getattr(level, "num_classes", None)]
        if _LABELLED.search(type(level).__name__):
            counts.append(getattr(getattr(level, "config", None), "num_labels", None))
        found = next((count for count in counts if isinstance(count, int)), None)
        if found is not None:
            return found
    return None


def _nested_models(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model, then its one child that holds all parameters, and so on inwards."""
    while True:
        yield model
        inner = [child for child in model.children() if _has_parameters(child)]
        lists = isinstance(model, (nn.ModuleList, nn.ModuleDict))
        if lists or len(inner) != 1 or next(model.parameters(recurse=False), None) is not None:
            return
        model = inner[0]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
