"""The run folder: metrics as JSON, curves as a picture, nothing overwritten."""

from __future__ import annotations

import dataclasses
import io
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlrr_kernels.checkpoint import write_atomically
from rlrr_kernels.finetune.settings import Settings

COLOURS = {"rlrr": "#1f5fa8", "linear": "#d08a1d", "full": "#5a9153"}
PACKAGES = ("rlrr_kernels", "torch", "triton", "timm", "torchvision", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Version of Python and of each package a result depends on, if installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def new_folder(path: Path) -> Path:
    """Create ``path``, or where that is taken ``path-2``, ``path-3``, and so on."""
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")


class RunFolder:
    """A new folder for one run.

    ``settings.out`` names it, and must not exist; without it the folder is
    ``runs/<data>-<model>-<method>-seed<seed>``, with a number where that is taken.

    Raises:
        FileExistsError: ``settings.out`` exists.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = self._create(settings)
        self.adapter = self.path / "adapter.safetensors"
        self.metrics: dict[str, Any] = {
            "run": str(self.path),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "settings": {
                key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(settings).items()
            },
            "versions": versions(),
        }

    @staticmethod
    def _create(settings: Settings) -> Path:
        if settings.out is not None:
            try:
                settings.out.mkdir(parents=True)
            except FileExistsError:
                raise FileExistsError(f"out: {settings.out} exists; a run never overwrites another") from None
            return settings.out
        data = settings.data.strip("/.").replace("/", "-")
        return new_folder(Path("runs") / f"{data}-{settings.model}-{settings.method}-seed{settings.seed}")

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``, whole."""
        write_atomically(self.path / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())

    def write_curves(self, metrics: dict[str, Any]) -> None:
        """Write ``curves.png``, if there is an epoch to draw."""
        if metrics["epochs"]:
            write_atomically(self.path / "curves.png", draw_curves(metrics))


def draw_curves(metrics: dict[str, Any]) -> bytes:
    """Loss and accuracy over the epochs as a PNG; the chosen epoch is marked."""
    epochs = metrics["epochs"]
    x = [e["epoch"] for e in epochs]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, key, label in ((loss, "loss", "cross-entropy"), (accuracy, "accuracy", "accuracy")):
        axes.plot(x, [e[f"train_{key}"] for e in epochs], color="#888888", label="train")
        axes.plot(x, [e[f"val_{key}"] for e in epochs], color=COLOURS["rlrr"], label="validation")
        best = metrics.get("best_epoch")
        if best is not None:
            axes.axvline(best, color=COLOURS["rlrr"], lw=0.8, ls=":", label=f"chosen: epoch {best}")
        if f"test_{key}" in metrics:
            test = metrics[f"test_{key}"]
            axes.plot([best], [test], "o", color="#c0392b", label=f"test {test:.4f}")
        _finish(axes, label)
    settings = metrics["settings"]
    figure.suptitle(
        f"{settings['method']} on {settings['data']}, {settings['model']}, "
        f"{metrics['trainable_parameters']:,} trained parameters, seed {settings['seed']}",
        fontsize=10,
    )
    return _png(figure)


def draw_comparison(runs: Sequence[dict[str, Any]]) -> bytes:
    """Validation accuracy over the epochs, a line a run and a colour a method, as a PNG."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for run in runs:
        method = run["settings"]["method"]
        axes.plot(
            [e["epoch"] for e in run["epochs"]],
            [e["val_accuracy"] for e in run["epochs"]],
            color=COLOURS[method],
            alpha=0.8,
            label=None if method in labelled else f"{method}: {run['trainable_parameters']:,} trained parameters",
        )
        labelled.add(method)
    _finish(axes, "validation accuracy")
    settings = runs[0]["settings"]
    axes.set_title(f"{settings['data']}, {settings['model']}, a line a seed", fontsize=10)
    return _png(figure)


def _finish(axes: Axes, ylabel: str) -> None:
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    return buffer.getvalue()
