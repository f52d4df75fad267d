"""The tensors of an adapter: which tensors of a model they are, whether others fit, and copying those."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from rlrr_kernels.io.checks import sanitize, summarize
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.models import running_stats
from rlrr_kernels.models.adapt import apply_rlrr
from rlrr_kernels.models.bypass import meta_copy
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.modules import adapters, head_parameters, plain_name
from rlrr_kernels.ops import route

#: Dtypes of tensors that are loaded into parameters; torch cannot convert some of its other floating point dtypes.
LOADABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter: all that need gradients, and u, v, f, affines and the trained head even if they are frozen."""
    config = getattr(model, "rlrr_config", None)
    chosen = set()
    if config is not None and config.train_head:
        chosen = {id(parameter) for parameter in head_parameters(model).values()}
    for _, module in adapters(model):
        for name, parameter in module.named_parameters(recurse=False):
            if name not in ("weight", "bias"):
                chosen.add(id(parameter))
    return {name: p for name, p in parameters_of(model).items() if p.requires_grad or id(p) in chosen}


def trained_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Name -> running statistic of the norms that are trained, which belong to the adapter too."""
    return running_stats.statistics(running_stats.trained_norms(model))


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, with the names from before parts of the model were compiled."""
    return {plain_name(name): p for name, p in model.named_parameters()}


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or running statistic: all that an adapter may have."""
    return {**parameters_of(model), **running_stats.statistics(running_stats.stateful_norms(model))}


def check_fit(
    model: nn.Module,
    config: RLRRConfig | None,
    tensors: Mapping[str, Tensor],
    source: str,
    optional: Collection[str] = (),
    scalings: Mapping[str, float] | None = None,
) -> bool:
    """Check that tensors are those of the model's adapter, without changing the model.

    Args:
        model: A plain or prepared model.
        config: How a plain model would be prepared; None to leave it plain.
        tensors: Name -> values.
        source: What the error message calls them.
        optional: Names that may be missing.
        scalings: Name of a linear -> its scaling, where that is not the config's (1 without a config); None if the
            scalings of layers without a config are unknown.

    Returns:
        Whether the model is plain and must be prepared with ``config`` before the tensors are copied.

    Raises:
        ValueError: If a name, shape or dtype does not fit, or adapters are merged or switched off.
    """
    check_enabled(model)
    check_unmerged(model)
    layers = [module for _, module in adapters(model)]
    _check_ranks(model, config, tensors, source, scalings)
    plan, prepare = model, config is not None and not layers
    if prepare:
        try:
            plan = apply_rlrr(meta_copy(model), config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source} does not fit the model: {error}") from error
    known, wanted = _tensors_of(plan), set(trained_parameters(plan))
    if not (layers or prepare) and len(wanted) == len(parameters_of(plan)):
        wanted = set()  # in a plain model it is not known which parameters were trained
    if config is not None and config.train_batch_norm:
        wanted |= trained_statistics(plan).keys()  # without the option, older adapters lack those of a head
    problems = [f"missing {name}" for name in sorted(wanted - tensors.keys() - set(optional))]
    problems += [f"unexpected {sanitize(name)}" for name in sorted(tensors.keys() - known.keys())]
    for name in sorted(known.keys() & tensors.keys()):
        tensor, expected = tensors[name], known[name]
        if tensor.shape != expected.shape:
            problems.append(f"{name} of shape {list(tensor.shape)}, expected {list(expected.shape)}")
        elif not expected.is_floating_point():
            if tensor.dtype is not expected.dtype:
                problems.append(f"{name} of {tensor.dtype}, expected {expected.dtype}")
        elif tensor.dtype not in LOADABLE_DTYPES:
            problems.append(f"{name} of {tensor.dtype}, expected floating point numbers")
    linears = {plain_name(name) for name, module in adapters(plan) if isinstance(module, FusedRLRRLinear)}
    problems += [f"unexpected scaling of {sanitize(name)}" for name in sorted((scalings or {}).keys() - linears)]
    if problems:
        raise ValueError(f"{source} does not fit the model: {summarize(problems)}")
    return prepare


def _check_ranks(
    model: nn.Module,
    config: RLRRConfig | None,
    tensors: Mapping[str, Tensor],
    source: str,
    scalings: Mapping[str, float] | None,
) -> None:
    """Check that a prepared model's layers have the rank and the scaling that its adapter was trained with.

    Raises:
        ValueError: If they have not.
    """
    for name, layer in adapters(model):
        u = tensors.get(f"{plain_name(name)}.scale_out".removeprefix("."))
        if not isinstance(layer, FusedRLRRLinear) or u is None:
            continue
        rank = u.shape[1] if u.dim() == 2 else layer.rank
        unsaid = layer.scaling if scalings is None else 1.0
        scaling = (scalings or {}).get(plain_name(name), unsaid if config is None else config.scaling)
        if (rank, scaling) != (layer.rank, layer.scaling):
            prepare = f"prepare the model with apply_rlrr(rank={rank}, scaling={scaling:g}), or "
            raise ValueError(
                f"{source} does not fit the model: it has rank {rank} and scaling {scaling:g}, and the model's "
                f"{plain_name(name) or 'layer'} has rank {layer.rank} and scaling {layer.scaling:g}; "
                f"{'' if scalings else prepare}give the plain model"
            )


@torch.no_grad()
def copy_into(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device | str | None = None) -> None:
    """Copy checked tensors into a model; its tensors on the meta device are created on ``device`` (default: CPU)."""
    own = _tensors_of(model)
    made: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if own[name].is_meta:
            values = tensor.to(device or "cpu", own[name].dtype, copy=True)
            is_parameter = isinstance(own[name], nn.Parameter)
            made[id(own[name])] = nn.Parameter(values, own[name].requires_grad) if is_parameter else values
    # by identity, as a tensor may be shared by several modules
    for module in model.modules():
        for leaf, old in [*module._parameters.items(), *module._buffers.items()]:
            if id(old) in made:
                setattr(module, leaf, made[id(old)])
    for name, tensor in tensors.items():
        if id(own[name]) not in made:
            own[name].copy_(route.laid_out_as(tensor, own[name]))


def check_enabled(model: nn.Module) -> None:
    """Check that no adapter is switched off.

    Raises:
        ValueError: If one is.
    """
    for name, module in adapters(model):
        if not module.enabled:
            raise ValueError(
                f"model: {name or 'the layer'} is switched off, as inside disable_adapter; switch it on first"
            )


def check_unmerged(model: nn.Module) -> None:
    """Check that no layer is merged: loaded tensors belong beside the frozen weight.

    Raises:
        ValueError: If one is.
    """
    if any(isinstance(module, FusedRLRRLinear) and module.merged for _, module in adapters(model)):
        raise ValueError("model: it is merged; unmerge before loading")
