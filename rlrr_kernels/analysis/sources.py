"""Readers of tuned models: each returns a :class:`Tuned`, with an update for each linear that was changed.

Nothing is computed here; the forms of updates are in :mod:`rlrr_kernels.analysis.updates`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rlrr_kernels.analysis.base import linear_weights, read_tensors
from rlrr_kernels.analysis.updates import LowRank, OutputScaled, Replaced, Rescaled, Update
from rlrr_kernels.checkpoint import CONFIG, WEIGHTS, adapter_metadata
from rlrr_kernels.checkpoint.manifest import Manifest, fingerprint, same_weights
from rlrr_kernels.io.checks import expect, read_json
from rlrr_kernels.layers.linear import FusedRLRRLinear

#: Options of PEFT with which the weight is not W + scaling * B A.
_NOT_PLAIN_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "alora_invocation_tokens",
    "layer_replication",
)

# alpha / r in all LoRA runs of rlrr-finetune; the files do not hold it
_RUN_SCALING = 2.0

# Names of the scales after linears in SSF's own code; its other scales follow LayerNorms
_SSF_NAMES = {
    "attn.ssf_scale_1": "attn.qkv",
    "attn.ssf_scale_2": "attn.proj",
    "mlp.ssf_scale_1": "mlp.fc1",
    "mlp.ssf_scale_2": "mlp.fc2",
}


@dataclass(frozen=True)
class Tuned:
    """A tuned model.

    Attributes:
        method: ``"RLRR"``, ``"SSF"``, ``"LoRA"`` or ``"full"``.
        path: Where it was read.
        updates: Layer name in the base -> update of its weight.
        skipped: Names of tuned tensors that belong to no linear of the base: heads, affines after norms, convolutions.
    """

    method: str
    path: str
    updates: Mapping[str, Update]
    skipped: tuple[str, ...] = ()


def rlrr_of_model(model: nn.Module) -> tuple[dict[str, Tensor], Tuned]:
    """Return the base weights and the updates of a model in memory, after ``apply_rlrr`` and training.

    Raises:
        ValueError: If it has no :class:`~rlrr_kernels.FusedRLRRLinear`.
        RuntimeError: If the layers are merged and their frozen weights were not kept.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedRLRRLinear)}
    if not layers:
        raise ValueError("model: it holds no FusedRLRRLinear; expected one that apply_rlrr prepared")
    weights = linear_weights(model)
    updates = {
        name: Rescaled(layer.scale_out.detach() * layer.scaling, layer.scale_in.detach())
        for name, layer in layers.items()
    }
    return {name: weights[name] for name in layers}, Tuned("RLRR", type(model).__name__, updates)


def rlrr_adapter(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """Read an adapter folder, or the run folder that contains it.

    Args:
        path: A folder that :func:`~rlrr_kernels.save_adapter` or ``rlrr-finetune`` wrote.
        base: Layer name -> weight of the model it was trained on.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has no u and v, is a run of another method, or was trained on other weights than the base's.
    """
    folder = _adapter_folder(path)
    manifest, _, state = _saved(folder, "rlrr")
    names = [name.removesuffix(".scale_out") for name in state if name.endswith(".scale_out")]
    if not names:
        raise ValueError(f"{folder}: expected an RLRR adapter, and there is no scale_out in it")
    usual, own = 1.0 if manifest.rlrr is None else manifest.rlrr.scaling, manifest.scalings or {}
    updates: dict[str, Update] = {}
    for name in names:
        u, v = state[f"{name}.scale_out"], state.get(f"{name}.scale_in")
        if v is None:
            raise ValueError(f"{folder}: {name}.scale_in is missing")
        u = u * own.get(name, usual)
        updates[name] = _built(folder, name, lambda u=u, v=v: Rescaled(u, v))  # type: ignore[misc]
        _check_fingerprint(folder, name, manifest, base)
    parts = ("scale_out", "scale_in", "shift")
    used = {f"{name}.{part}" for name in names for part in parts}
    return _tuned("RLRR", folder, updates, set(state) - used, base)


def lora_adapter(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """Read a LoRA adapter: W + scaling * B A, where scaling is alpha / r, or alpha / sqrt(r) with rslora.

    Args:
        path: A folder that PEFT wrote, or a run folder of ``rlrr-finetune`` or the adapter folder in it.
        base: Layer name -> weight of the model it was trained on.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is no plain LoRA (but DoRA, an initialisation that changes the base weights, ...), has none of
            the base's layers, or (a run) was trained on other weights.
    """
    folder = _adapter_folder(path)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "peft_type" in config:
        _check_plain_lora(folder, config)
        manifest, state, ending = None, read_tensors(folder / WEIGHTS), ".weight"
    else:
        manifest, said, state = _saved(folder, "lora")
        if said is None:
            raise ValueError(
                f"{folder}: its scaling is not known; expected a run of rlrr-finetune, or a folder that PEFT saved"
            )
        ending = ".default.weight"
    updates: dict[str, Update] = {}
    skipped = {key for key in state if ".lora_" not in key}
    for stem, (a, b) in _factors(folder, state, ending).items():
        name = stem.removeprefix("base_model.model.")
        if a.ndim != 2:
            skipped.add(name)  # LoRA of a convolution
            continue
        # the file's patterns are matched with the base's names only: with a long name of the file it could take hours
        known = not manifest and name in base
        scaling = _lora_scaling(folder, config, name, a.shape[0]) if known else _RUN_SCALING
        updates[name] = _built(folder, name, lambda a=a, b=b, s=scaling: LowRank(a, b, s))  # type: ignore[misc]
        _check_fingerprint(folder, name, manifest, base)
    return _tuned("LoRA", folder, updates, skipped, base)


def ssf_checkpoint(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """Read SSF's scales after linears: ``<layer>.ssf_scale`` ``[N]``, or under the names of SSF's own ViT code.

    Scales after LayerNorms, and shifts, change no weight and are skipped.

    Args:
        path: A file with a state dict; or a run folder of ``rlrr-finetune`` or the adapter folder in it.
        base: Layer name -> weight of the model it was trained on.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is a run of another method, has no scale after any linear of the base, or was trained on other
            weights than the base's, if it says on which.
    """
    path = Path(path)
    manifest, heads = None, set()
    if path.is_dir():
        path = _adapter_folder(path)
        manifest, _, state = _saved(path, "ssf")
        heads = {key for key in state if not key.endswith((".ssf_scale", ".ssf_shift"))}
    else:
        state = read_tensors(path)
    updates: dict[str, Update] = {}
    skipped: set[str] = heads
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
            _check_fingerprint(path, name, manifest, base)
            updates[name] = OutputScaled(scale)
    return _tuned("SSF", path, updates, skipped, base)


def full_checkpoint(path: str | Path, base: Mapping[str, Tensor]) -> Tuned:
    """Read a fully fine-tuned model: a state dict with the base's names, as a file, a run folder or an adapter folder.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is a run of another method, or has no weight of any linear of the base.
    """
    path = Path(path)
    state = _saved(_adapter_folder(path), "full")[-1] if path.is_dir() else read_tensors(path)
    updates = {name: Replaced(state[f"{name}.weight"]) for name in base if f"{name}.weight" in state}
    used = {f"{name}.{part}" for name in updates for part in ("weight", "bias")}
    return _tuned("full", path, updates, set(state) - used, base)


def _adapter_folder(path: str | Path) -> Path:
    path = Path(path)
    folder = path / "adapter" if (path / "adapter").is_dir() else path
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: expected an adapter folder or a run folder")
    return folder


def _tuned(
    method: str, path: Path, updates: Mapping[str, Update], skipped: set[str], base: Mapping[str, Tensor]
) -> Tuned:
    known = {name: update for name, update in updates.items() if name in base}
    if not known:
        tuned = f", such as {next(iter(updates))}," if updates else ""
        raise ValueError(
            f"{path}: nothing that was tuned{tuned} is a linear of the base, which has {_first_names(base)}"
        )
    return Tuned(method, str(path), known, tuple(sorted(skipped | (updates.keys() - known.keys()))))


def _saved(folder: Path, method: str) -> tuple[Manifest, str | None, dict[str, Tensor]]:
    """Read what :func:`~rlrr_kernels.save_adapter` wrote: manifest, method if it was a run's, and tensors.

    Raises:
        ValueError: If it is no adapter, or of a run of another method than ``method``.
    """
    from rlrr_kernels.finetune.settings import METHODS

    manifest = Manifest.read(folder)
    said = adapter_metadata(folder).get("method")
    if said not in METHODS:
        said = None  # the user's own metadata, not a run's
    elif said != method:
        raise ValueError(f"{folder}: expected an adapter of method {method}, got one of {said}")
    return manifest, said, read_tensors(folder / WEIGHTS)


def _check_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(f"{folder}: expected a LoRA adapter of PEFT, got peft_type {config['peft_type']!r}")
    for option in _NOT_PLAIN_LORA:
        if config.get(option):
            raise ValueError(f"{folder}: {option} is set, and only plain LoRA can be analysed")
    if config.get("fan_in_fan_out"):
        raise ValueError(f"{folder}: fan_in_fan_out is set, and layers of the base are nn.Linear")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise ValueError(
            f"{folder}: init_lora_weights {start!r} changes the base weights. Save the adapter with "
            "path_initial_model_for_weight_conversion, which refers it to the original ones"
        )


def _factors(folder: Path, state: Mapping[str, Tensor], ending: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> A and B, of tensors ``<layer>.lora_A<ending>`` and ``<layer>.lora_B<ending>``."""
    found = {}
    for key, a in state.items():
        stem, is_a, _ = key.partition(f".lora_A{ending}")
        if is_a:
            b = state.get(f"{stem}.lora_B{ending}")
            if b is None:
                raise ValueError(f"{folder}: {stem}.lora_B{ending} is missing")
            found[stem] = a, b
        elif ".lora_" in key and not key.endswith(f".lora_B{ending}"):
            raise ValueError(f"{folder}: {key} belongs to no plain LoRA")
    return found


def _built(path: Path, name: str, build: Any) -> Update:
    try:
        update: Update = build()
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {error}") from error
    return update


def _first_names(names: Mapping[str, Tensor]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if shown else "none"


def _lora_scaling(folder: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha: Any = config.get("lora_alpha")
    try:
        patterns = expect({"alpha_pattern": None, **config}, "alpha_pattern", dict, type(None)) or {}
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    for pattern, value in patterns.items():
        # PEFT takes the first pattern that matches the whole name, or its end after a dot
        if _matches(pattern, name, folder / CONFIG):
            alpha = value
            break
    # numbers in JSON may be larger than any float
    if type(alpha) not in (int, float) or not abs(alpha) < 1e300:
        raise ValueError(f"{folder / CONFIG}: lora_alpha: expected a number, got {alpha!r:.80}")
    if rank < 1:
        raise ValueError(f"{folder}: {name}: expected a rank of 1 or more, got {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(pattern: str, name: str, source: Path) -> bool:
    # nested repetition takes exponential time, and several repetitions a high power of the name's length
    if len(pattern) > 200 or len(re.findall(r"[*+?{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern):
        raise ValueError(
            f"{source}: alpha_pattern: expected a name, or a simple pattern over names, got {pattern!r:.80}"
        )
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{source}: alpha_pattern: {pattern!r:.80} is no pattern: {error}") from error


def _ssf_layer(key: str) -> str | None:
    if key.endswith(".ssf_scale"):
        return key.removesuffix(".ssf_scale")
    for ending, layer in _SSF_NAMES.items():
        if key.endswith("." + ending):
            return key.removesuffix(ending) + layer
    return None


def _check_fingerprint(path: Path, name: str, manifest: Manifest | None, base: Mapping[str, Tensor]) -> None:
    known = {} if manifest is None else manifest.fingerprint
    # PEFT keeps the wrapped layer under this name
    expected = known.get(name, known.get(f"{name}.base_layer"))
    if expected is not None and name in base and not same_weights(fingerprint(base[name]), expected):
        raise ValueError(
            f"{path}: it was trained on other weights than the base's, by the fingerprint of {name}.weight"
        )


def _check_same(path: Path, name: str, state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    weight = state.get(f"{name}.weight")
    if weight is None:
        return
    # storage in bfloat16 changes a weight by less than 0.4%
    if weight.shape != base[name].shape or (weight.float() - base[name].float()).norm() > 1e-2 * base[name].norm():
        raise ValueError(f"{path}: its {name}.weight is not the base's, so it was tuned from other weights")
