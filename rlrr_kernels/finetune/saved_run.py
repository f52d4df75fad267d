"""Reading a run folder: its metrics, the state to resume from, and the tuned model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rlrr_kernels.checkpoint import WEIGHTS, adapter_metadata, load_adapter
from rlrr_kernels.checkpoint.manifest import Manifest
from rlrr_kernels.finetune.backbone import build_model
from rlrr_kernels.finetune.data import Splits
from rlrr_kernels.finetune.run_folder import ADAPTER, METRICS, STATE, STATE_FORMAT, State
from rlrr_kernels.finetune.settings import DEFAULTS, PROTOCOLS, Settings, check_types
from rlrr_kernels.io.checks import expect, expect_names, parse_json, read_json
from rlrr_kernels.io.reading import read_safetensors

#: Settings in which a run and its continuation may differ: they do not change what is computed. Another ``data`` or
#: ``data_root`` must hold the same images, see :func:`check_data`.
MAY_DIFFER = frozenset({"device", "workers", "cache", "compile", "out", "resume", "tensorboard", "data", "data_root"})

#: Types of the entries of ``metrics.json`` that are read. A run that diverged lacks some.
METRICS_TYPES: Mapping[str, tuple[type, ...]] = {
    "test_accuracy": (float,),
    "classes": (int,),
    "data_fingerprint": (str,),
    "task": (str, type(None)),
    "protocol_note": (str,),
    "error": (str,),
    "interrupted": (bool,),
    "finished": (bool,),
    "epochs": (list,),
}

#: Settings that build the model as timm does.
UNTUNED: Mapping[str, Any] = {"method": "full", "rank": 1, "frozen_dtype": ""}

#: Methods for comparison. Their adapters do not describe themselves, and they are not merged.
PEERS = ("ssf", "lora")


class Finished(ValueError):
    """The run is finished, so there is nothing to resume."""


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read and check the ``metrics.json`` of a run folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not what a run writes.
    """
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no metrics.json")
    try:
        metrics = read_json(path)
        settings = expect(metrics, "settings", dict)
        check_types(settings)
        expect(metrics, "protocol", str)
        for name in ("model", "seed"):
            expect(settings, name, type(DEFAULTS[name]))
        for name, types in METRICS_TYPES.items():
            if name in metrics:
                expect(metrics, name, *types)
        if not 0 <= metrics.get("test_accuracy", 0) <= 1:
            raise ValueError(f"test_accuracy: expected 0 to 1, got {metrics['test_accuracy']}")
    except ValueError as error:
        raise ValueError(f"{path} is not what a run writes: {error}") from error
    return metrics


def read_state(folder: Path) -> State | None:
    """Read and check the state in a run folder. Returns None for an empty folder.

    Raises:
        FileNotFoundError: If the folder does not exist.
        Finished: If the run is finished.
        ValueError: If the folder or file does not belong to a run, or is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"resume: {folder} is no folder")
    path, metrics = folder / STATE, folder / METRICS
    if metrics.is_file():
        try:
            found = read_json(metrics)
            finished = expect({"finished": False, **found}, "finished", bool)
            count = len(expect(found, "epochs", list)) if finished else 0
        except ValueError as error:
            raise ValueError(f"resume: {metrics} cannot be read: {error}") from error
        if finished:
            raise Finished(f"resume: the run in {folder} is finished, after {count} epochs")
    if not path.is_file():
        # the name of a temporary file begins with a dot
        if not any(each.is_file() and not each.name.startswith(".") for each in folder.rglob("*")):
            return None
        raise ValueError(f"resume: {folder} is no unfinished run: it has no {STATE}")
    try:
        header, tensors = read_safetensors(path)
        if header.get("format") != STATE_FORMAT:
            raise ValueError(f"expected a file of format {STATE_FORMAT!r}, got {header.get('format')!r:.80}")
        record = parse_json(header.get("record", ""), "its record")
        _check_record(record)
        return State(record, tensors)
    except ValueError as error:
        raise ValueError(f"resume: {path} cannot be read: {error}") from error


def _check_record(record: Mapping[str, Any]) -> None:
    """Check that a state's record has everything that a continuation needs, with the right types."""
    epoch = expect(record, "epoch", int, least=0)
    expect(record, "processes", int, least=1)
    expect(record, "classes", int, least=1)
    for name in ("settings", "images", "scaler"):
        expect(record, name, dict)
    check_types(record["settings"])
    metrics = expect(record, "metrics", dict)
    epochs = expect(metrics, "epochs", list)
    expect(record, "data_fingerprint", str)
    expect_names(metrics, "class_names", record["classes"])
    for name in ("settings", "processes", "images", "classes", "data_fingerprint"):
        if metrics.get(name) != record.get(name):
            raise ValueError(
                f"metrics: {name}: expected {record.get(name)!r:.80}, as in the record, got {metrics.get(name)!r:.80}"
            )
    expect(metrics, "train_seconds", float, least=0)
    expect({"resumed_after": [], **metrics}, "resumed_after", list)
    protocol = expect(metrics, "protocol", str)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r:.80}")
    if len(epochs) != epoch:
        raise ValueError(f"epochs: expected figures of {epoch}, got {len(epochs)}")
    split = {"choose-epoch": "val", "best-on-test": "test"}.get(protocol)
    splits = ("train", split) if split else ("train",)
    for number, figures in enumerate(epochs, 1):
        if type(figures) is not dict or figures.get("epoch") != number:
            raise ValueError(f"epochs: expected the figures of epoch {number}, got {figures!r:.80}")
        for name in (f"{part}_{figure}" for part in splits for figure in ("loss", "accuracy")):
            expect(figures, name, float)
    if epochs and expect(metrics, "best_epoch", int, least=1) > epoch:
        raise ValueError(f"best_epoch: expected at most {epoch}, got {metrics['best_epoch']}")


def settings_to_resume(folder: Path, options: Mapping[str, Any]) -> Settings:
    """The settings of the run in ``folder``, updated by ``options``. :func:`check_settings` checks the difference.

    Raises:
        ValueError, FileNotFoundError: If there is no run to resume; see :func:`read_state` and :class:`Settings`.
    """
    state = read_state(folder)
    if state is None:
        raise ValueError(f"resume: expected the folder of an unfinished run, got {folder}, which is empty")
    return Settings.from_dict({**state.record["settings"], "out": None, **options, "resume": folder})


def recorded_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the settings in a file by the defaults of settings that were added later.

    Raises:
        ValueError: If a value has the wrong type.
    """
    check_types(values)
    return {**Settings().to_dict(), **values}


def check_settings(recorded: Mapping[str, Any], settings: Settings, source: str) -> None:
    """Check that ``settings`` differ from those of a run only where a continuation may (:data:`MAY_DIFFER`).

    Args:
        recorded: The run's settings, as read from a file.
        settings: Settings of the continuation.
        source: What to call the run in the message.

    Raises:
        ValueError: If another setting differs. The message starts with the field.
    """
    own = recorded_settings(recorded)
    # a task ignores data
    may_differ = MAY_DIFFER - {"data"} if settings.task else MAY_DIFFER
    for name, value in settings.to_dict().items():
        if name not in may_differ and own.get(name) != value:
            raise ValueError(f"{name}: expected {own.get(name)!r}, as in {source}, got {value!r}")


def check_state(state: State, **values: Any) -> None:
    """Check that the run to resume recorded these values of ``processes``, ``images`` or ``classes``.

    Raises:
        ValueError: If a value differs.
    """
    for name, value in values.items():
        if state.record[name] != value:
            raise ValueError(f"{name}: expected {state.record[name]}, as in the run to resume, got {value}")


def check_data(recorded: Mapping[str, Any], settings: Settings, splits: Splits) -> None:
    """Check that these images are the ones that a run was trained on, wherever they lie.

    Args:
        recorded: A state's record or a run's metrics.
        settings: The settings by which the images were found.
        splits: The images.

    Raises:
        ValueError: If they are not.
    """
    if expect(recorded, "data_fingerprint", str) != splits.fingerprint:
        where = settings.task or settings.data
        raise ValueError(
            f"data: expected the images of the run, got others in {where}: other names, classes, order or number"
        )


@dataclass(frozen=True)
class SavedRun:
    """A run folder or an adapter folder.

    Attributes:
        adapter: The adapter's folder.
        settings: Settings of the run, updated by the user's options; without ``out`` and ``resume``.
        classes: Number of classes of the head.
        metrics: Contents of ``metrics.json``; empty for an adapter without a run.
        class_names: Names in the order of the logits, or None if unknown.
    """

    adapter: Path
    settings: Settings
    classes: int
    metrics: Mapping[str, Any]
    class_names: tuple[str, ...] | None = None

    def model(self) -> nn.Module:
        """Build the model with its adapter, on the CPU, in evaluation mode.

        Raises:
            ValueError, FileNotFoundError: If the base model or the adapter is missing, or they do not fit.
        """
        settings = self.settings
        if settings.method not in PEERS:
            # the adapter says which layers are adapted, and how
            settings = dataclasses.replace(settings, **UNTUNED)
        model = build_model(settings, self.classes)
        load_adapter(model, self.adapter)
        return model.eval()

    def plain_model(self) -> nn.Module:
        """Build timm's own model of the same shape, with random weights."""
        bare: dict[str, Any] = {**UNTUNED, "checkpoint": None, "pretrained": False}
        return build_model(dataclasses.replace(self.settings, **bare), self.classes).eval()

    def label_names(self) -> dict[str, str]:
        """The class names as metadata of exported files: ``label_names``, timm's key, with a JSON list."""
        return {} if self.class_names is None else {"label_names": json.dumps(self.class_names)}


def open_run(path: Path, options: Mapping[str, Any]) -> SavedRun:
    """Find the settings and the adapter of a run.

    Args:
        path: A run folder, its ``adapter`` folder, or the folder of another adapter.
        options: Settings that replace the run's.

    Raises:
        FileNotFoundError: If there is no such folder, or it has no adapter.
        ValueError: If its files are not what a run writes.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder; expected a run or an adapter")
    if (path / METRICS).is_file():
        folder, adapter = path, path / ADAPTER
        if not adapter.is_dir():
            raise FileNotFoundError(f"{path} has no adapter folder: the run was stopped before its first epoch ended")
    elif (path / "adapter_config.json").is_file():
        folder, adapter = path.resolve().parent, path
    else:
        raise FileNotFoundError(f"{path} is neither a run nor an adapter: no metrics.json, no adapter_config.json")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    if (folder / METRICS).is_file() and (folder / ADAPTER).resolve() == adapter.resolve():
        metrics = read_metrics(folder)
        try:
            classes = expect(metrics, "classes", int, least=1)
            names = expect_names(metrics, "class_names", classes)
            settings = Settings.from_dict({**metrics["settings"], "out": None, "resume": None, **options})
        except ValueError as error:
            raise ValueError(f"{folder / METRICS}: {error}") from error
        _check_classes(adapter, classes)
        return SavedRun(adapter, settings, classes, metrics, names)
    manifest = Manifest.read(adapter)
    name, tag = (manifest.base_model.get(key) for key in ("architecture", "tag"))
    if manifest.num_classes is None or not (name or "model" in options):
        raise ValueError(f"{adapter} does not name its timm model or number of classes; --model gives the first")
    _check_classes(adapter, manifest.num_classes)
    values = {"model": f"{name}.{tag}" if tag else name, **options}
    if manifest.rlrr is None:
        values["method"] = adapter_metadata(adapter).get("method", "full")
    return SavedRun(adapter, Settings.from_dict(values), manifest.num_classes, {}, manifest.class_names)


def _check_classes(adapter: Path, classes: int) -> None:
    """Refuse a number of classes that cannot be in the adapter, as the head is allocated before the file is read.

    A model without a head has 0 classes.
    """
    weights = adapter / WEIGHTS
    size = weights.stat().st_size if weights.is_file() else 0
    if not 0 <= classes <= size:
        raise ValueError(
            f"{adapter}: expected the number of classes of a head in {WEIGHTS} ({size} bytes), got {classes}"
        )
