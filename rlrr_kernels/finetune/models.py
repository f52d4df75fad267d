"""The timm model of a run: its weights, a new head, and what the method trains."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from rlrr_kernels.checkpoint import load_npz_backbone
from rlrr_kernels.checkpoint.trained import LOADED, in_short, printable
from rlrr_kernels.finetune.peers import apply_lora, apply_ssf, matching_rank
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.reading import read_state_dict
from rlrr_kernels.models import running_stats
from rlrr_kernels.models.adapt import apply_rlrr, replace
from rlrr_kernels.models.modules import head
from rlrr_kernels.models.selection import architecture_of

#: What the command line calls dtypes.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(settings: Settings, classes: int) -> nn.Module:
    """The timm model with a new head, and what the method trains left trainable.

    Raises:
        ValueError: timm does not know the model, its weights cannot be had or do not
            fit, it has no ``img_size`` or drop path to set, no linear head to start at zero, or it is of a family
            that the method does not know. With ``method="rlrr"`` also what
            :func:`~rlrr_kernels.apply_rlrr` raises.
    """
    model: Any = _create(settings, classes)
    if settings.checkpoint is not None:
        load_backbone(model, settings.checkpoint)
    # timm keeps a pretrained head of the same size, which means nothing for other classes
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
    """``ValueError`` if the method would train batch norms: a run keeps parameters, and no running statistics."""
    name = next((name for name, _ in running_stats.trained_norms(model)), None)
    if name is not None:
        raise ValueError(
            f"model: {settings.model!r} has batch norm that would train with method={settings.method!r}: {name}; "
            "expected another method, or a model without, such as a ViT"
        )


@torch.no_grad()
def _zero_head(model: nn.Module, settings: Settings) -> None:
    """Every class gets the same score at the start, as with the published code's ``zero_head``."""
    layers = [module for module in head(model).modules() if next(module.parameters(recurse=False), None) is not None]
    # of several layers one after another only the last bias would ever get a gradient
    if not layers or not all(isinstance(layer, nn.Linear) for layer in layers):
        raise ValueError(
            f"head_init: expected random with model={settings.model!r}, whose head is no nn.Linear, got zero"
        )
    for layer in layers:
        for parameter in layer.parameters():
            parameter.zero_()


def _drop_elements(model: nn.Module, settings: Settings) -> None:
    """Make stochastic depth what the published ViT calls drop path: dropout of a branch's elements, at the same rates.

    Both draw from torch's own generator, which the trainer seeds.
    """
    paths = [name for name, module in model.named_modules() if isinstance(module, DropPath)]
    if settings.drop_path and not paths:
        raise ValueError(
            f"drop_path_kind: expected image with model={settings.model!r}, which has no DropPath of timm, got element"
        )
    for name in paths:
        replace(model, name, nn.Dropout(cast(DropPath, model.get_submodule(name)).drop_prob))


def _create(settings: Settings, classes: int) -> nn.Module:
    # a rate of 0 is passed on as well: Swin's own default is not 0
    options: dict[str, Any] = {"num_classes": classes, "drop_path_rate": settings.drop_path}
    if settings.img_size:
        options["img_size"] = settings.img_size
    pretrained = settings.pretrained and settings.checkpoint is None
    if not timm.is_model(settings.model):
        # also hf-hub:... and local-dir:..., by which the name in a stranger's file could load anything
        raise unknown(settings.model)
    while True:
        try:
            return timm.create_model(settings.model, pretrained=pretrained, **options)
        except TypeError as error:
            # some architectures have no such argument
            name = next((name for name in ("drop_path_rate", "img_size") if f"'{name}'" in str(error)), None)
            if name is None:
                raise
            if options.pop(name):
                field = name.removesuffix("_rate")
                raise ValueError(f"{field}: {settings.model!r} takes none, got {getattr(settings, field)}") from error
        except (RuntimeError, OSError) as error:
            raise ValueError(f"model {settings.model!r} cannot be built: {error}") from error


def unknown(name: str) -> ValueError:
    """The error for a name that timm does not have: it names those that are near."""
    near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3, cutoff=0.8)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists those that it does"
    return ValueError(f"model: timm does not know {name!r:.80}; {hint}")


def load_backbone(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint into everything but the head; position embeddings are resized as timm does.

    Args:
        model: a timm model; a ViT for a ``.npz``, whose head is loaded too where it has as many classes.
        path: safetensors, a ``.pth`` that holds tensors only (code in it is not run), or a ``.npz`` as
            :func:`~rlrr_kernels.load_npz_backbone` takes it.

    Raises:
        ValueError: no such file format, or names or shapes that differ outside the head.
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
    # the filter takes for granted that tensors have the number of dimensions that they should have
    except Exception as error:
        raise ValueError(f"checkpoint: {path} cannot be read: {error}") from error
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(heads)}
    # before anything is copied: load_state_dict copies what fits, and then says what did not
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(heads)}
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unexpected {printable(name)}" for name in state if name not in own]
    for name in own.keys() & state.keys():
        if state[name].shape != own[name].shape:
            problems.append(f"{name} of shape {list(state[name].shape)}, expected {list(own[name].shape)}")
        elif own[name].is_floating_point() and state[name].dtype not in LOADED:
            problems.append(f"{name} of {state[name].dtype}, expected floating point numbers")
    if problems:
        raise ValueError(f"checkpoint: {path} does not fit {type(model).__name__}: {in_short(problems)}")
    model.load_state_dict(state, strict=False)
