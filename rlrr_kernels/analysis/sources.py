"""Tuned models, however they were tuned, as one thing: a name, and an update for each linear that was changed.

Every function here reads files or modules and computes nothing; what a form of update
means is in :mod:`rlrr_kernels.analysis.updates`. Pickles are read with ``weights_only``:
code in them is not run.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rlrr_kernels.analysis.updates import LowRank, OutputScaled, Replaced, Rescaled, Update
from rlrr_kernels.checkpoint.manifest import TOLERANCES, Manifest, fingerprint
from rlrr_kernels.linear import FusedRLRRLinear

# PEFT and this package call them alike
ADAPTER_TENSORS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

#: Options of PEFT that make something else of A and B than W + scaling * B A.
_NOT_PLAIN_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
    "layer_replication",
)

# Where SSF's own code keeps the scales after a block's linears; those that it keeps in the block follow LayerNorms
_SSF_NAMES = {
    "attn.ssf_scale_1": "attn.qkv",
    "attn.ssf_scale_2": "attn.proj",
    "mlp.ssf_scale_1": "mlp.fc1",
    "mlp.ssf_scale_2": "mlp.fc2",
}


@dataclass(frozen=True)
class Tuned:
    """A tuned model beside its base.

    Attributes:
        method: ``"RLRR"``, ``"SSF"``, ``"LoRA"`` or ``"full"``.
        path: where it was read.
        updates: layer name, as in the base -> what was done to its weight.
        skipped: names of tuned tensors that belong to no linear of the base: heads, affines after norms, convolutions.
    """

    method: str
    path: str
    updates: Mapping[str, Update]
    skipped: tuple[str, ...] = ()


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> W ``[N, K]`` of each ``nn.Linear`` of a model, without copies; of adapted layers the frozen one."""
    # by state_dict, which has the frozen weight of a merged layer too
    return {
        name: module.state_dict()["weight"]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name
    }


def rlrr_of_model(model: nn.Module) -> tuple[dict[str, Tensor], Tuned]:
    """The base weights and the updates of a model in memory, as ``apply_rlrr`` and training left it.

    Raises:
        ValueError: it has no :class:`~rlrr_kernels.FusedRLRRLinear`.
        RuntimeError: they are merged and their frozen weights were not kept.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedRLRRLinear)}
    if not layers:
        raise ValueError("model: it holds no FusedRLRRLinear; expected one that apply_rlrr prepared")
    weights = linear_weights(model)
    updates = {name: Rescaled(layer.scale_out.detach(), layer.scale_in.detach()) for name, layer in layers.items()}
    return {name: weights[name] for name in layers}, Tuned("RLRR", type(model).__name__, updates)


def rlrr_adapter(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """An adapter folder, or the run folder it lies in.

    Args:
        path: what :func:`~rlrr_kernels.save_adapter` or ``rlrr-finetune`` wrote.
        base: layer name -> weight, of the model it was trained on.

    Raises:
        FileNotFoundError, ValueError: no such folder, no u and v in it, or trained on other weights than the base's.
    """
    folder = _adapter_folder(path)
    manifest, state = Manifest.read(folder), _read(folder / ADAPTER_TENSORS)
    names = [name.removesuffix(".scale_out") for name in state if name.endswith(".scale_out")]
    if not names:
        raise ValueError(f"{folder}: expected an RLRR adapter, and there is no scale_out in it")
    updates: dict[str, Update] = {}
    for name in names:
        u, v = state[f"{name}.scale_out"], state.get(f"{name}.scale_in")
        if v is None:
            raise ValueError(f"{folder}: {name}.scale_in is missing")
        updates[name] = _built(folder, name, lambda u=u, v=v: Rescaled(u, v))  # type: ignore[misc]
        if name in base and name in manifest.fingerprint:
            _check_fingerprint(folder, name, base[name], manifest.fingerprint[name])
    parts = ("scale_out", "scale_in", "shift")
    used = {f"{name}.{part}" for name in names for part in parts}
    return _tuned("RLRR", folder, updates, set(state) - used, base)


def lora_adapter(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """A LoRA adapter folder of PEFT: W + scaling * B A, where scaling is alpha / r, or alpha / sqrt(r) with rslora.

    Raises:
        FileNotFoundError, ValueError: no such folder, no plain LoRA (DoRA, an initialisation
            that changed the base weights, ...), or of other layers than the base's.
    """
    folder = Path(path)
    config = _read_json(folder / ADAPTER_CONFIG)
    state = _read(folder / ADAPTER_TENSORS)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: expected a LoRA adapter of PEFT, got peft_type {config.get('peft_type')!r}")
    for option in _NOT_PLAIN_LORA:
        if config.get(option):
            raise ValueError(f"{folder}: {option} is set, and only plain LoRA can be analysed")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise ValueError(
            f"{folder}: init_lora_weights {start!r} changes the base weights. Save the adapter with "
            "path_initial_model_for_weight_conversion, which refers it to the original ones"
        )
    updates: dict[str, Update] = {}
    skipped: set[str] = set()
    for key, a in state.items():
        stem, is_a, _ = key.partition(".lora_A.weight")
        if not is_a:
            if ".lora_" in key and not key.endswith(".lora_B.weight"):
                raise ValueError(f"{folder}: {key} belongs to no plain LoRA")
            continue
        b = state.get(f"{stem}.lora_B.weight")
        if b is None:
            raise ValueError(f"{folder}: {stem}.lora_B.weight is missing")
        name = stem.removeprefix("base_model.model.")
        if a.ndim != 2:
            skipped.add(name)  # of a convolution
            continue
        scaling = _lora_scaling(folder, config, name, a.shape[0])
        if config.get("fan_in_fan_out"):
            raise ValueError(f"{folder}: fan_in_fan_out is set, and {name} of the base is an nn.Linear")
        updates[name] = _built(folder, name, lambda a=a, b=b, s=scaling: LowRank(a, b, s))  # type: ignore[misc]
    skipped |= {key for key in state if ".lora_" not in key}
    return _tuned("LoRA", folder, updates, skipped, base)


def ssf_checkpoint(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """A state dict with a scale after linears: ``<layer>.ssf_scale`` ``[N]``, or the names of SSF's own ViT code.

    Scales after LayerNorms, and shifts, change no weight and are left out.

    Raises:
        FileNotFoundError, ValueError: no such file, no scale after any linear of the base,
            or the file also holds weights and they are not the base's.
    """
    path = Path(path)
    state = _read(path)
    updates: dict[str, Update] = {}
    skipped: set[str] = set()
    for key, scale in state.items():
        name = _ssf_layer(key)
        if name is None:
            skipped |= {key} if "ssf_scale" in key else set()
        else:
            if name in base and scale.numel() != base[name].shape[0]:
                raise ValueError(
                    f"{path}: {key} has {scale.numel()} values, and {name} has {base[name].shape[0]} outputs"
                )
            if name in base:
                _check_same(path, name, state, base)
            updates[name] = OutputScaled(scale)
    return _tuned("SSF", path, updates, skipped, base)


def full_checkpoint(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """A fully fine-tuned model: a state dict with the base's names, as a file or in a run folder.

    Raises:
        FileNotFoundError, ValueError: no such file, or no weight of any linear of the base in it.
    """
    path = Path(path)
    file = _adapter_folder(path) / ADAPTER_TENSORS if path.is_dir() else path
    state = _read(file)
    updates = {name: Replaced(state[f"{name}.weight"]) for name in base if f"{name}.weight" in state}
    used = {f"{name}.{part}" for name in updates for part in ("weight", "bias")}
    return _tuned("full", path, updates, set(state) - used, base)


def base_weights(base: str, checkpoint: str | Path | None = None) -> dict[str, Tensor]:
    """Layer name -> weight of every linear but the head.

    Args:
        base: a timm model name; or a run folder, whose model and weights are taken; or a file with a state dict.
        checkpoint: weights for the model, instead of its pretrained ones or the run's.

    Raises:
        FileNotFoundError, ValueError: the model is unknown, or its weights cannot be had or do not fit.
    """
    path = Path(base)
    if path.is_file():
        if checkpoint is not None:
            raise ValueError(f"checkpoint: expected none with a base that is a file, {path}")
        state = _read(path)
        found = {n.removesuffix(".weight"): t for n, t in state.items() if n.endswith(".weight") and t.ndim == 2}
        if not found:
            raise ValueError(f"{path}: no matrix named <layer>.weight in it")
        return found
    name, pretrained = base, True
    if path.is_dir():
        settings = _read_json(path / "metrics.json").get("settings")
        if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
            raise ValueError(f"{path / 'metrics.json'}: expected the settings of a run, with the name of its model")
        name, pretrained = settings["model"], bool(settings.get("pretrained", True))
        if not pretrained and not (checkpoint or settings.get("checkpoint")):
            raise ValueError(f"{path}: the run started from random weights; name them with --checkpoint")
        checkpoint = checkpoint or settings.get("checkpoint")
    return _timm_weights(name, pretrained, None if checkpoint is None else Path(checkpoint))


def _timm_weights(name: str, pretrained: bool, checkpoint: Path | None) -> dict[str, Tensor]:
    import timm

    from rlrr_kernels.finetune.models import load_backbone

    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint: {checkpoint} does not exist")
    try:
        # without classes there is no head, which would be random here
        model = timm.create_model(name, pretrained=pretrained and checkpoint is None, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"base: {name!r} is no file or folder, and not to be had from timm: {error}") from error
    if checkpoint is not None:
        load_backbone(model, checkpoint)
    return linear_weights(model)


def _tuned(
    method: str, path: Path, updates: Mapping[str, Update], skipped: set[str], base: Mapping[str, Tensor]
) -> Tuned:
    known = {name: update for name, update in updates.items() if name in base}
    if not known:
        tuned = f", such as {next(iter(updates))}," if updates else ""
        raise ValueError(f"{path}: nothing that was tuned{tuned} is a linear of the base, which has {_few(base)}")
    return Tuned(method, str(path), known, tuple(sorted(skipped | (updates.keys() - known.keys()))))


def _built(path: Path, name: str, build: Any) -> Update:
    try:
        update: Update = build()
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    return update


def _few(names: Mapping[str, Tensor]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if shown else "none"


def _lora_scaling(folder: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # PEFT's rule: the end of the name, from a dot on; the first that matches counts
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: lora_alpha: expected a number, got {alpha!r}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _ssf_layer(key: str) -> str | None:
    if key.endswith(".ssf_scale"):
        return key.removesuffix(".ssf_scale")
    for ending, layer in _SSF_NAMES.items():
        if key.endswith("." + ending):
            return key.removesuffix(ending) + layer
    return None


def _check_fingerprint(path: Path, name: str, weight: Tensor, expected: tuple[float, float]) -> None:
    mean, alternating = fingerprint(weight)
    of_mean, of_alternating = TOLERANCES
    if abs(mean - expected[0]) > of_mean * abs(expected[0]) or abs(alternating - expected[1]) > of_alternating:
        raise ValueError(
            f"{path}: it was trained on other weights than the base's, by the fingerprint of {name}.weight"
        )


def _check_same(path: Path, name: str, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    weight = state.get(f"{name}.weight")
    if weight is None:
        return
    # storage in bfloat16 moves a weight by less than 0.4%
    if weight.shape != base[name].shape or (weight.float() - base[name].float()).norm() > 1e-2 * base[name].norm():
        raise ValueError(f"{path}: its {name}.weight is not the base's, so it was tuned from other weights")


def _adapter_folder(path: str | Path) -> Path:
    path = Path(path)
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: expected an adapter folder or a run folder")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(found).__name__}")
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """Floating-point tensors by name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        else:
            from timm.models import load_state_dict

            state = load_state_dict(str(path), device="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return {n: t for n, t in state.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
