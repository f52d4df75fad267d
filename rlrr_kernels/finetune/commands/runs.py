"""A finished run, opened again: its settings, its model, its adapter."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlrr_kernels import adapter_metadata, load_adapter, merge_and_unload
from rlrr_kernels.checkpoint import WEIGHTS
from rlrr_kernels.checkpoint.manifest import Manifest
from rlrr_kernels.finetune.commands.results import read_run
from rlrr_kernels.finetune.models import build_model
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.reading import expect, expect_names
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.models.modules import adapters

#: Settings with which a model is built as timm builds it.
BARE: Mapping[str, Any] = {"method": "full", "frozen_dtype": ""}

#: Methods that are here to compare with. Their adapters do not describe themselves, and they are not merged.
PEERS = ("ssf", "lora")


@dataclass(frozen=True)
class Run:
    """A run folder, or an adapter folder.

    Attributes:
        adapter: folder of the adapter.
        settings: as it was trained, with what the user gave in their place; no ``out``, no ``resume``.
        classes: of the head.
        metrics: contents of ``metrics.json``, empty for a bare adapter.
        class_names: in the order of the logits; None if they are not known.
    """

    adapter: Path
    settings: Settings
    classes: int
    metrics: Mapping[str, Any]
    class_names: tuple[str, ...] | None = None

    def model(self) -> nn.Module:
        """The model with its adapter, on the CPU, in evaluation mode.

        Raises:
            ValueError, FileNotFoundError: the base model or the adapter cannot be had, or they do not fit.
        """
        settings = self.settings
        if settings.method not in PEERS:
            # which layers are adapted, and how, is written in the adapter
            settings = dataclasses.replace(settings, **BARE)
        model = build_model(settings, self.classes)
        load_adapter(model, self.adapter)
        return model.eval()

    def labels(self) -> dict[str, str]:
        """What files for others say of the classes: ``label_names``, as timm calls them, a JSON list."""
        return {} if self.class_names is None else {"label_names": json.dumps(self.class_names)}

    def plain(self) -> nn.Module:
        """timm's own model of the same shape, with random weights."""
        bare: dict[str, Any] = {**BARE, "checkpoint": None, "pretrained": False}
        return build_model(dataclasses.replace(self.settings, **bare), self.classes).eval()


def open_run(path: Path, options: Mapping[str, Any]) -> Run:
    """Find the settings and the adapter of a run.

    Args:
        path: a run folder, its ``adapter`` folder, or the folder of an adapter from elsewhere.
        options: settings to use in place of the run's.

    Raises:
        FileNotFoundError: no such folder, or one without an adapter.
        ValueError: files that are not what a run writes.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; expected a run or an adapter")
    if (path / "metrics.json").is_file():
        folder, adapter = path, path / "adapter"
        if not adapter.is_dir():
            raise FileNotFoundError(f"{path} has no adapter folder: the run was stopped before its first epoch ended")
    elif (path / "adapter_config.json").is_file():
        folder, adapter = path.resolve().parent, path
    else:
        raise FileNotFoundError(f"{path} is neither a run nor an adapter: no metrics.json, no adapter_config.json")
    if (folder / "metrics.json").is_file() and (folder / "adapter").resolve() == adapter.resolve():
        metrics = read_run(folder)
        values = {**metrics["settings"], "out": None, "resume": None, **_plain(options)}
        try:
            classes = expect(metrics, "classes", int, least=1)
            names = expect_names(metrics, "class_names", classes)
            settings = Settings.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{folder / 'metrics.json'}: {error}") from error
        _check_classes(adapter, classes)
        return Run(adapter, settings, classes, metrics, names)
    manifest = Manifest.read(adapter)
    name, tag = (manifest.base_model.get(key) for key in ("architecture", "tag"))
    if manifest.num_classes is None or not (name or "model" in options):
        raise ValueError(f"{adapter} does not name its timm model or number of classes; --model gives the first")
    _check_classes(adapter, manifest.num_classes)
    values = {"model": f"{name}.{tag}" if tag else name, **_plain(options)}
    if manifest.rlrr is None:
        values["method"] = adapter_metadata(adapter).get("method", "full")
    return Run(adapter, Settings.from_dict(values), manifest.num_classes, {}, manifest.class_names)


def _check_classes(adapter: Path, classes: int) -> None:
    """``ValueError`` for a head that cannot be in the adapter: one as large as said is made before that is read.

    A model without a head has 0 classes.
    """
    weights = adapter / WEIGHTS
    size = weights.stat().st_size if weights.is_file() else 0
    if not 0 <= classes <= size:
        raise ValueError(
            f"{adapter}: expected the number of classes of a head in {WEIGHTS} ({size} bytes), got {classes}"
        )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """The positional argument that all readers of a run have."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or the folder of an adapter")


@dataclass(frozen=True)
class Merged:
    """A plain timm model that computes what the tuned one does.

    Attributes:
        model: in float32, in evaluation mode, on the CPU.
        images: float32 ``[count, C, H, W]``, random, on which the two were compared.
        logits: of the tuned model on them, before it was merged, float32 ``[count, classes]``.
        frozen: name -> W of each rescaled linear, for what rounding loses.
    """

    model: nn.Module
    images: Tensor
    logits: Tensor
    frozen: Mapping[str, Tensor]


@torch.no_grad()
def merged(run: Run, *, safe: bool, count: int = 4) -> Merged:
    """Merge a run's model into plain layers, in float32 whatever the frozen weights are kept in.

    Args:
        run: whose model.
        safe: refuse values that are not finite.
        count: random images for a comparison.

    Raises:
        ValueError: as :meth:`Run.model`; a method that is not merged here; or ``safe`` and a merged value
            is not finite.
    """
    if run.settings.method in PEERS:
        raise ValueError(f"method: expected a run of rlrr, linear or full to merge, got {run.settings.method}")
    model = run.model().float()
    images = torch.randn(count, *input_size(model), generator=torch.Generator().manual_seed(0))
    logits = model(images)
    frozen = {name: m.weight for name, m in model.named_modules() if isinstance(m, FusedRLRRLinear)}
    if any(True for _ in adapters(model)):
        with warnings.catch_warnings():
            # where it matters, in the file of rlrr-finetune merge, the command says it
            warnings.filterwarnings("ignore", "merging gave ")
            model = merge_and_unload(model, safe_merge=safe)
    elif safe and not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError("safe: the model has values that are not finite")
    return Merged(model.eval(), images, logits, frozen)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) that a timm model takes, as it was built."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = config["input_size"]
    return (channels, *size) if size is not None else (channels, height, width)


def compare(ours: Tensor, theirs: Tensor) -> tuple[float, float, int]:
    """(largest difference, largest ``ours``, rows with the same prediction) of logits ``[count, classes]``."""
    difference = (ours - theirs).abs().max().item()
    return difference, ours.abs().max().item(), int((ours.argmax(1) == theirs.argmax(1)).sum())
