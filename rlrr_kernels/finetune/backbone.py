"""The timm model of a run: its weights, a new head, and the method that says what trains."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn import functional as F

from rlrr_kernels.backends.reference import accumulation_dtype
from rlrr_kernels.checkpoint import load_npz_backbone
from rlrr_kernels.checkpoint.trained import LOADABLE_DTYPES
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.checks import sanitize, summarize
from rlrr_kernels.io.reading import read_state_dict
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.models import running_stats
from rlrr_kernels.models.adapt import apply_rlrr, qkv_readers
from rlrr_kernels.models.bypass import meta_copy
from rlrr_kernels.models.modules import head, replace
from rlrr_kernels.models.parameters import count_parameters
from rlrr_kernels.models.selection import architecture_of

#: Names of dtypes on the command line.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(settings: Settings, classes: int) -> nn.Module:
    """Build the timm model with a new head, where only what the method trains requires gradients.

    Raises:
        ValueError: If timm does not know the model, its weights are missing or do not fit, it does not support a
            setting (``img_size``, ``drop_path``, ``head_init``), or the method does not know its family. With
            ``method="rlrr"`` also as :func:`~rlrr_kernels.apply_rlrr` raises.
    """
    model: Any = _create(settings, classes)
    if settings.checkpoint is not None:
        load_backbone(model, settings.checkpoint)
    # timm keeps a pretrained head of the same size, which is for other classes
    model.reset_classifier(classes)
    if settings.head_init == "zero":
        _zero_head(model, settings)
    if settings.drop_path_kind == "element":
        _drop_elements(model, settings)
    if settings.method not in ("linear", "full") and architecture_of(model) is None:
        raise ValueError(
            f"model: expected a ViT, EVA, BEiT or Swin of timm with method={settings.method!r}, got "
            f"{settings.model!r}, a {type(model).__name__}; method='linear' and method='full' take any"
        )
    if settings.method == "rlrr":
        apply_rlrr(
            model,
            init=settings.init,
            rank=settings.rank,
            # None is what was published for the model's family, which may be no affine at all
            norm_affine=None if settings.norm_affine else False,
            patch_affine=None if settings.patch_affine else False,
            frozen_dtype=DTYPES[settings.frozen_dtype] if settings.frozen_dtype else None,
        )
    elif settings.method == "ssf":
        apply_ssf(model)
    elif settings.method == "lora":
        apply_lora(model, settings.lora_rank or matching_rank(model))
    elif settings.method == "linear":
        model.requires_grad_(False)
        head(model).requires_grad_(True)
    running_stats.freeze(model)
    return model


def check_statistics(model: nn.Module, settings: Settings) -> None:
    """Refuse a method that would train batch norms: a run saves parameters, not running statistics.

    Raises:
        ValueError: If the model has a batch norm that would train.
    """
    name = next((name for name, _ in running_stats.trained_norms(model)), None)
    if name is not None:
        raise ValueError(
            f"model: {settings.model!r} has batch norm that would train with method={settings.method!r}: {name}; "
            "expected another method, or a model without, such as a ViT"
        )


@torch.no_grad()
def _zero_head(model: nn.Module, settings: Settings) -> None:
    """Set the head to zero, as the published code's ``zero_head`` does."""
    layers = [module for module in head(model).modules() if next(module.parameters(recurse=False), None) is not None]
    # in a stack of zero layers only the last bias would get a gradient
    if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
        raise ValueError(
            f"head_init: expected random with model={settings.model!r}, whose head is no nn.Linear, got zero"
        )
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()


def _drop_elements(model: nn.Module, settings: Settings) -> None:
    """Replace stochastic depth by dropout of the branch's elements at the same rates, as in the published ViT."""
    paths = [name for name, module in model.named_modules() if isinstance(module, DropPath)]
    if settings.drop_path and not paths:
        raise ValueError(
            f"drop_path_kind: expected image with model={settings.model!r}, which has no DropPath of timm, got element"
        )
    for name in paths:
        replace(model, name, nn.Dropout(cast(DropPath, model.get_submodule(name)).drop_prob))


def _create(settings: Settings, classes: int) -> nn.Module:
    # a rate of 0 is passed as well: Swin's own default is not 0
    options: dict[str, Any] = {"num_classes": classes, "drop_path_rate": settings.drop_path}
    if settings.img_size:
        options["img_size"] = settings.img_size
    pretrained = settings.pretrained and settings.checkpoint is None
    if not timm.is_model(settings.model):
        # refuses hf-hub:... and local-dir:... too: a name in an untrusted file must not load anything
        raise unknown_model(settings.model)
    while True:
        try:
            return timm.create_model(settings.model, pretrained=pretrained, **options)
        except TypeError as error:
            # some architectures do not take these arguments
            name = next((name for name in ("drop_path_rate", "img_size") if f"'{name}'" in str(error)), None)
            if name is None:
                raise
            if options.pop(name):
                field = name.removesuffix("_rate")
                raise ValueError(f"{field}: {settings.model!r} takes none, got {getattr(settings, field)}") from error
        except (RuntimeError, OSError) as error:
            raise ValueError(f"model {settings.model!r} cannot be built: {error}") from error


def unknown_model(name: str) -> ValueError:
    """The error for a name that timm does not know, with similar names."""
    near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3, cutoff=0.8)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists those that it does"
    return ValueError(f"model: timm does not know {name!r:.80}; {hint}")


def load_backbone(model: nn.Module, path: Path) -> None:
    """Load a checkpoint into everything but the head. Position embeddings are resized as timm does.

    Args:
        model: A timm model; for ``.npz`` a ViT, whose head is loaded too if it has as many classes.
        path: A safetensors file, a ``.pth`` with tensors only (code in it is not run), or a ``.npz`` for
            :func:`~rlrr_kernels.load_npz_backbone`.

    Raises:
        ValueError: If the file cannot be read, or names or shapes outside the head differ.
    """
    if path.suffix == ".npz":
        try:
            load_npz_backbone(model, path)
        except (TypeError, ValueError) as error:
            raise ValueError(f"checkpoint: {path}: {error}") from error
        return
    try:
        state = read_state_dict(path)
        if isinstance(model, VisionTransformer):
            state = checkpoint_filter_fn(state, model)
    # the filter raises anything for tensors with an unexpected number of dimensions
    except Exception as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from error
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    # checked first, as load_state_dict copies what fits before it raises
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {sanitize(name)}" for name in state if name not in own]
    for name in own.keys() & state.keys():
        if state[name].shape != own[name].shape:
            problems.append(f"{name} of shape {list(state[name].shape)}, expected {list(own[name].shape)}")
        elif own[name].is_floating_point() and state[name].dtype not in LOADABLE_DTYPES:
            problems.append(f"{name} of {state[name].dtype}, expected floating point numbers")
    if problems:
        raise ValueError(f"checkpoint: {path} does not fit {type(model).__name__}: {summarize(problems)}")
    model.load_state_dict(state, strict=False)


class SSFLinear(nn.Linear):
    """y = (x W^T + b) * s + t with W, b frozen and s, t ``[N]`` trained (SSF, arXiv 2210.08823, Eq. 2).

    Args:
        linear: The layer whose weight and bias are shared and frozen.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, False, "meta")
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        new: dict[str, Any] = {"device": linear.weight.device, "dtype": accumulation_dtype(linear.weight.dtype)}
        self.ssf_scale = nn.Parameter(torch.empty(self.out_features, **new).normal_(1.0, 0.02))
        self.ssf_shift = nn.Parameter(torch.empty(self.out_features, **new).normal_(0.0, 0.02))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        return F.linear(x, self.weight, self.bias) * self.ssf_scale + self.ssf_shift


def apply_ssf(model: nn.Module) -> nn.Module:
    """Apply SSF in place: an affine after each linear of the blocks, each LayerNorm and the patch embedding.

    The layers are those that :func:`~rlrr_kernels.apply_rlrr` adapts. The head trains too.

    Raises:
        TypeError, ValueError: As :func:`~rlrr_kernels.apply_rlrr`.
    """
    apply_rlrr(model, patch_affine=True, norm_affine=True)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, FusedRLRRLinear):
            replace(model, name, SSFLinear(layer))
    # the record of what apply_rlrr did is no longer true
    del model.rlrr_config, model._rlrr_base
    return model


def apply_lora(model: nn.Module, rank: int) -> nn.Module:
    """Apply PEFT's LoRA in place to the linears that RLRR would adapt, with alpha = 2 rank. The head trains too.

    Raises:
        ValueError: If PEFT is not installed.
        TypeError: If RLRR does not know the model's family.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("method: expected peft to be installed for lora (pip install peft)") from error
    targets = [name for name, _ in _adapted_linears(model)]
    for module in qkv_readers(model, targets):
        module.qkv_bias_separate = True
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
    head(model).requires_grad_(True)
    return model


def matching_rank(model: nn.Module) -> int:
    """The smallest LoRA rank that trains at least as many parameters as RLRR of rank 1, without the head."""
    per_rank = sum(linear.in_features + linear.out_features for _, linear in _adapted_linears(model))
    count, _ = count_parameters(apply_rlrr(meta_copy(model), train_head=False))
    return -(-count // per_rank)


def _adapted_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    adapted = apply_rlrr(meta_copy(model), train_head=False)
    return [(name, layer) for name, layer in adapted.named_modules() if isinstance(layer, FusedRLRRLinear)]
