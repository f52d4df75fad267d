"""Running statistics of batch norms and similar layers, which training changes without a gradient.

A frozen norm must stay in evaluation mode whatever ``model.train()`` says: otherwise the model that was tuned is not
the model that is saved. The statistics of a norm that trains are saved with the adapter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from rlrr_kernels.models.modules import head, plain_name

#: Buffers that a training pass changes in batch norms, instance norms and timm's EvoNorm.
STATISTICS = ("running_mean", "running_var")


def stateful_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of each norm with running statistics.

    timm's and torchvision's frozen batch norms are left out: their weights are buffers.
    """
    for name, module in model.named_modules():
        if _has_buffer(module, STATISTICS) and "weight" not in module._buffers:
            yield plain_name(name), module


def trained_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of each norm with running statistics that trains.

    It trains if one of its parameters needs a gradient, if it is in a head that trains, or if the model was adapted
    with ``train_batch_norm``.
    """
    config = getattr(model, "rlrr_config", None)
    train_all = config is not None and config.train_batch_norm
    classifier = head(model)
    in_head = set(classifier.modules()) if _needs_grad(classifier.parameters()) else set()
    for name, module in stateful_norms(model):
        if train_all or module in in_head or _needs_grad(module.parameters(recurse=False)):
            yield name, module


def statistics(norms: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Return {full name: buffer} of the given (name, module) pairs, named as in the state dict."""
    return {
        f"{name}.{leaf}" if name else leaf: buffer
        for name, module in norms
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set
    }


def freeze(model: nn.Module) -> None:
    """Keep norms that do not train in evaluation mode, now and after each ``model.train()``.

    Which norms train is decided at each call of ``train``, because norms may be converted to ``SyncBatchNorm`` or set
    to need gradients later.
    """
    if next(stateful_norms(model), None) is not None or next(_spectral_norms(model), None) is not None:
        vars(model)["train"] = functools.partial(_train, model)
        _stop_frozen(model)


def unfreeze(model: nn.Module) -> None:
    """Undo :func:`freeze`."""
    if getattr(vars(model).get("train"), "func", None) is _train:
        del vars(model)["train"]


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for ``model.train``."""
    kind: Any = type(model)
    kind.train(model, mode)
    _stop_frozen(model)
    return model


def _stop_frozen(model: nn.Module) -> None:
    trained = {id(module) for _, module in trained_norms(model)}
    # not eval(), which would also switch off the dropout inside such a module
    for _, module in stateful_norms(model):
        if id(module) not in trained:
            module.training = False
    for owner, module in _spectral_norms(model):
        if not _needs_grad(owner.parameters(recurse=False)):
            module.training = False


def _spectral_norms(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield (owner of the weight, module with the estimate) of each spectral norm, by hook or by parametrization."""
    for owner in model.modules():
        parts = owner if isinstance(owner, ParametrizationList) else ()
        yield from ((owner, part) for part in parts if _has_buffer(part, ("_u",)))
        if _has_buffer(owner, ("weight_u",)):
            yield owner, owner


def _has_buffer(module: nn.Module, names: Iterable[str]) -> bool:
    return any(module._buffers.get(name) is not None for name in names)


def _needs_grad(parameters: Iterable[Tensor]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)
