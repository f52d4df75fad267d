"""``apply_rlrr``: puts adapters into a model, in place."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm
from rlrr_kernels.models import bypass, running_stats
from rlrr_kernels.models.config import RLRRConfig
from rlrr_kernels.models.disable import BaseState, remember_base
from rlrr_kernels.models.modules import (
    adapters,
    check_head,
    check_not_distributed,
    head,
    head_parameters,
    replace,
    unwrapped,
)
from rlrr_kernels.models.selection import feeds_only_linears, select


def apply_rlrr(
    model: nn.Module, config: RLRRConfig | None = None, *, example_input: Any = None, **options: Any
) -> nn.Module:
    """Adapt a model, in place: it then trains u, v, f of its linears, the affines and the head, and nothing else.

    Args:
        model: A timm ViT, DeiT, CLIP-style ViT, DINOv2 or v3, EVA-02, BEiT, Swin or Swin V2; or any module, with
            ``target_modules``. It may be compiled, or wrapped by ``DataParallel``.
        config: See :class:`~rlrr_kernels.RLRRConfig`; None for the published method.
        example_input: What ``model`` is called with: a tensor, or a tuple of positional arguments. Only shapes and
            dtypes matter. The model runs on it on the meta device, to find layers that its code bypasses. Not needed
            for timm's image models. Without it, the first training pass of another model warns of bypassed layers.
        **options: Fields of the config. They replace those of ``config``.

    Returns:
        The same model. The config is ``model.rlrr_config``, of the inner model if there is a wrapper.

    Raises:
        TypeError: If the model is of another family and ``target_modules`` is not given, an option is unknown, a
            selected linear is refused by :meth:`FusedRLRRLinear.from_linear`, a LayerNorm is of a kind that can have
            no affine, or DDP or FSDP manages the parameters.
        ValueError: If a pattern matches nothing, groups do not divide a layer, the model already holds adapters or a
            lazy module that was never called, it has classes and no head to train, or its code reads the weights of a
            selected layer instead of calling it. The model is then unchanged.

    Warns:
        UserWarning: If selected norms are no LayerNorms and get no affine.
    """
    if not isinstance(config, RLRRConfig | None):
        raise TypeError(
            f"config: expected an RLRRConfig, got {type(config).__name__}; linears are named in target_modules"
        )
    config = dataclasses.replace(config or RLRRConfig(), **options)
    check_not_distributed(model)
    given, model = model, unwrapped(model)
    if next(adapters(model), None) is not None:
        raise ValueError("model: it already holds RLRR adapters; apply_rlrr goes on a plain model")
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise ValueError(f"model: {lazy} has no shape yet, as its module is lazy; call the model once before")
    classifier = head(model, config.head_names)
    if config.train_head:
        check_head(model, classifier)
    selection = select(model, config, classifier)
    separate_bias = qkv_readers(model, selection.linears)
    try:
        for module in separate_bias:
            module.qkv_bias_separate = True
        was_run = _check_calls(model, selection.names, example_input)
    except BaseException:
        for module in separate_bias:
            module.qkv_bias_separate = False
        raise

    # from here on the model is changed, and nothing raises
    model.requires_grad_(False)
    made: dict[int, nn.Module] = {}  # by identity: a layer that is used in two places stays one layer
    for name, groups in selection.linears.items():
        linear: Any = model.get_submodule(name)
        if id(linear) not in made:
            made[id(linear)] = FusedRLRRLinear.from_linear(
                linear,
                groups=groups,
                init=config.init,
                dtype=config.frozen_dtype,
                rank=config.rank,
                scaling=config.scaling,
            )
        replace(model, name, made[id(linear)])
    for name, norm in selection.norms.items():
        if id(norm) not in made:
            made[id(norm)] = _norm_adapter(norm, name, model, config)
        replace(model, name, made[id(norm)])
    adapted: Any = model
    adapted.rlrr_config = config
    if config.train_head:
        for parameter in head_parameters(model).values():
            parameter.requires_grad_(True)
    if config.train_batch_norm:
        for _, module in running_stats.stateful_norms(model):
            module.requires_grad_(True)
    running_stats.freeze(model)
    if not was_run:
        bypass.FirstPassWatch(model, selection.names)
    adapted._rlrr_base = BaseState(
        separate_bias=[name for name, module in model.named_modules() if module in separate_bias],
        fast_paths=_disable_fast_paths(model),
    )
    remember_base(model)
    if selection.other_norms:
        warnings.warn(
            f"norm_affine: no affine after {bypass.first_names(selection.other_norms)}, which are norms but no "
            "LayerNorm and stay frozen as they are (name them in exclude_modules if that is meant)",
            stacklevel=2,
        )
    return given


def qkv_readers(model: nn.Module, linears: Iterable[str]) -> list[Any]:
    """Return the attention modules that call their qkv only if they add its bias separately (EVA, BEiT, Swin V2)."""
    parents = [model.get_submodule(name.rpartition(".")[0]) for name in linears if name.endswith(".qkv")]
    return [parent for parent in parents if getattr(parent, "qkv_bias_separate", None) is False]


def _check_calls(model: nn.Module, names: list[str], example_input: Any) -> bool:
    """Run the model on the meta device to check that it calls the named layers.

    Returns:
        Whether the model could be run.

    Raises:
        ValueError: If a layer was not called, or the model cannot be run on ``example_input``.
    """
    inputs = bypass.example_input(model) if example_input is None else example_input
    if inputs is None:
        return False
    try:
        missing = bypass.uncalled(model, names, inputs)
    except Exception as error:
        if example_input is not None:
            raise ValueError(f"example_input: {type(model).__name__} cannot be run on it: {error}") from error
        return False
    if missing:
        raise ValueError(f"model: {bypass.message(model, missing)}")
    return True


def _norm_adapter(norm: nn.Module, name: str, model: nn.Module, config: RLRRConfig) -> SSFLayerNorm | SSFAffine:
    """Return the module that takes a norm's place. A callable ``init`` is for linears: affines start as published."""
    init = config.init if isinstance(config.init, str) else "paper"
    if isinstance(norm, nn.LayerNorm):
        device = next((p.device for p in model.parameters()), None)
        layer = SSFLayerNorm.from_layer_norm(norm, init=init, device=device)
        layer.autocast_output = feeds_only_linears(model, name)
        return layer
    proj: Any = model.get_submodule("patch_embed.proj")
    weight: Tensor = proj.weight
    return SSFAffine(weight.shape[0], weight.device, weight.dtype, init=init).train(norm.training)


def _disable_fast_paths(model: nn.Module) -> dict[str, int]:
    """Make adapted ``nn.TransformerEncoderLayer`` modules call their linears, whose weights they read in evaluation.

    Returns:
        {name: what the switch of the fast path was}.
    """
    switches: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and next(adapters(module), None) is not None:
            switches[name] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0
    return switches
