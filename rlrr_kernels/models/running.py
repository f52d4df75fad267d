"""Running statistics: what batch norms and their like move in training, without a gradient and without a word.

A frozen one has to stay in evaluation whatever ``model.train()`` says, or the model that was tuned is not the one that
is saved. Of one that trains, the statistics belong to what is saved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from rlrr_kernels.models.heads import head
from rlrr_kernels.models.wrappers import plain_name

#: Buffers that a pass in training moves, of batch and instance norms and timm's EvoNorm.
STATISTICS = ("running_mean", "running_var")


def norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all norms with running statistics. timm's and torchvision's frozen ones hold no parameters."""
    for name, module in model.named_modules():
        if _has(module, STATISTICS) and "weight" not in module._buffers:
            yield plain_name(name), module


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the norms that train.

    They have a parameter that needs a gradient, or lie in a head that has, or are asked for by ``train_batch_norm``.
    """
    config = getattr(model, "rlrr_config", None)
    everything = config is not None and config.train_batch_norm
    classifier = head(model)
    heads = set(classifier.modules()) if _needs_grad(classifier.parameters()) else set()
    for name, module in norms(model):
        if everything or module in heads or _needs_grad(module.parameters(recurse=False)):
            yield name, module


def statistics(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Full name -> buffer of such (name, module), as in the state dict."""
    return {
        f"{name}.{leaf}" if name else leaf: buffer
        for name, module in modules
        for leaf, buffer in module._buffers.items()
        if buffer is not None and leaf not in module._non_persistent_buffers_set
    }


def hold(model: nn.Module) -> None:
    """Keep those that do not train in evaluation, now and after each ``model.train()``, whoever calls it.

    Decided at each call, so what is converted to ``SyncBatchNorm`` or set to need gradients later is seen.
    """
    if next(norms(model), None) is not None or next(_spectral(model), None) is not None:
        vars(model)["train"] = functools.partial(_train, model)
        _still(model)


def release(model: nn.Module) -> None:
    """Undo :func:`hold`."""
    if getattr(vars(model).get("train"), "func", None) is _train:
        del vars(model)["train"]


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    kind: Any = type(model)
    kind.train(model, mode)
    _still(model)
    return model


def _still(model: nn.Module) -> None:
    trains = {id(module) for _, module in trained(model)}
    # not eval(): dropout inside of it goes on
    for _, module in norms(model):
        if id(module) not in trains:
            module.training = False
    for owner, module in _spectral(model):
        if not _needs_grad(owner.parameters(recurse=False)):
            module.training = False


def _spectral(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(owner of the weight, module that follows it) of spectral norms: a hook's buffers, or a parametrization."""
    for owner in model.modules():
        parts = owner if isinstance(owner, ParametrizationList) else ()
        yield from ((owner, part) for part in parts if _has(part, ("_u",)))
        if _has(owner, ("weight_u",)):
            yield owner, owner


def _has(module: nn.Module, names: Iterable[str]) -> bool:
    return any(module._buffers.get(name) is not None for name in names)


def _needs_grad(parameters: Iterable[Tensor]) -> bool:
    return any(parameter.requires_grad for parameter in parameters)
