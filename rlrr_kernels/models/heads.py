"""The head of a model, which is new for each task: where libraries have it, and whether there should be one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from rlrr_kernels.models.wrappers import plain_name

#: What timm, torchvision and transformers call heads: first the usual names, then those of distilled and segmentation
#: models and of auxiliary losses. (Not ``lm_head``, which comes with the pretrained model.)
NAMES = (
    *("classifier", "head", "heads", "fc", "score"),
    *("head_dist", "dist_head", "cls_classifier", "distillation_classifier", "classifier_distill"),
    *("classification_head", "segmentation_head", "decode_head", "qa_outputs"),
    *("auxiliary_head", "aux_classifier", "aux1", "aux2", "AuxLogits"),
)

#: Models of transformers that give out ``config.num_labels`` numbers; the configs of all others have that field too.
_LABELLED = re.compile(r"For\w*(Classification|Segmentation|Detection|QuestionAnswering)")


def head(model: nn.Module, names: Sequence[str] | None = None) -> nn.Module:
    """The module that is a model's head, several as one list, which is empty where there is none.

    That is what ``model.get_classifier()`` returns (timm's convention), or else the children with parameters that are
    called as :data:`NAMES` says. A model that only wraps another one is looked into.

    Args:
        model: not wrapped, see :func:`~rlrr_kernels.models.wrappers.unwrapped`.
        names: of the head's modules, or shell patterns over full names; none to look for them. None: as
            ``train_head`` says in the config of a model that :func:`~rlrr_kernels.apply_rlrr` prepared.

    Raises:
        ValueError: a name that is of no module with parameters.
    """
    if names is None:
        config = getattr(model, "rlrr_config", None)
        names = () if config is None else config.head_names
    found = _named(model, names) if names else _found(model)
    return found[0] if len(found) == 1 else nn.ModuleList(found)


def check_head(model: nn.Module, found: nn.Module) -> None:
    """``ValueError`` if a model says that it has classes while nothing was found that tells them apart."""
    count = _classes(model)
    if count and not _has_parameters(found):
        raise ValueError(
            f"train_head: {type(model).__name__} has {count} classes, but no head was found: get_classifier() gives "
            f"none with parameters, and none is called {', '.join(NAMES[:4])} or {NAMES[4]}. Name its modules, as in "
            'train_head=["decoder.last"], or pass train_head=False if nothing in it is new'
        )


def _named(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = [(plain_name(name), module) for name, module in model.named_modules(remove_duplicate=False)]
    found: dict[int, nn.Module] = {}
    for pattern in names:
        matches = [m for name, m in modules if name and fnmatchcase(name, pattern) and _has_parameters(m)]
        if not matches:
            raise ValueError(f"train_head: {pattern!r} matches no module with parameters of {type(model).__name__}")
        found |= {id(module): module for module in matches}
    return list(found.values())


def _found(model: nn.Module) -> list[nn.Module]:
    for level in _levels(model):
        get = getattr(level, "get_classifier", None)
        given = get() if callable(get) else None
        if isinstance(given, (nn.Module, tuple, list)):
            modules = [given] if isinstance(given, nn.Module) else given
            return [module for module in modules if isinstance(module, nn.Module)]
        found = [module for name, module in level.named_children() if name in NAMES and _has_parameters(module)]
        if found:
            return found
    return []


def _classes(model: nn.Module) -> int | None:
    """How many classes a model says it has, or None."""
    for level in _levels(model):
        counts = [getattr(level, "num_classes", None)]
        if _LABELLED.search(type(level).__name__):
            counts.append(getattr(getattr(level, "config", None), "num_labels", None))
        found = next((count for count in counts if isinstance(count, int)), None)
        if found is not None:
            return found
    return None


def _levels(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and the one inside of it as long as that holds all parameters."""
    while True:
        yield model
        inner = [child for child in model.children() if _has_parameters(child)]
        lists = isinstance(model, (nn.ModuleList, nn.ModuleDict))
        if lists or len(inner) != 1 or next(model.parameters(recurse=False), None) is not None:
            return
        model = inner[0]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
