"""Writing a run folder: ``metrics.json``, ``state/``, ``adapter/``, TensorBoard events and ``curves.png``."""

from __future__ import annotations

import io
import itertools
import json
import os
import platform
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rlrr_kernels.finetune.distributed import World, on_main
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.files import check_writable, in_units, write_atomically

#: Contents of a run folder.
METRICS, ADAPTER, STATE = Path("metrics.json"), Path("adapter"), Path("state") / "last.safetensors"
STATE_FORMAT = "rlrr_kernels.state/1"

PACKAGES = ("rlrr_kernels", "torch", "triton", "timm", "torchvision", "numpy", "scikit-learn")
#: Bytes reserved for metrics, curves and TensorBoard events.
OTHER_FILES = 4 * 2**20
COLOURS = {"rlrr": "#1f5fa8", "linear": "#d08a1d", "full": "#5a9153", "ssf": "#8c6bb1", "lora": "#b0506a"}
#: The splits by which an epoch can be judged, in order of preference, and their names in figures.
JUDGED_BY = {"val": "validation", "test": "test", "train": "training"}


class NotWritten(OSError):
    """A file of a run in progress could not be written. The message says what was kept and how to resume."""


@dataclass(frozen=True)
class State:
    """A run after a whole number of epochs.

    Attributes:
        record: JSON values. ``settings``, ``processes``, ``images``, ``classes`` and ``data_fingerprint`` must match
            those of a continuation; ``epoch`` is the number of finished epochs; ``metrics`` and ``scaler`` are the
            run's metrics and the gradient scaler's state.
        tensors: Whole tensors on the CPU: ``trained/<name>``, ``optimizer/<name>/<key>``, and if they exist
            ``best/<name>`` and ``average/<name>``.
    """

    record: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors under one prefix, without the prefix."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def write(self, folder: Path) -> None:
        """Replace the state in a run folder atomically."""
        path = folder / STATE
        path.parent.mkdir(exist_ok=True)
        header = {"format": STATE_FORMAT, "record": json.dumps(self.record)}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        write_atomically(path, safetensors.torch.save(tensors, metadata=header))


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def new_folder(path: Path) -> Path:
    """Create the folder ``path``, or ``path-2``, ``path-3``, ... if it exists."""
    for candidate in _numbered(path):
        with suppress(FileExistsError):
            candidate.mkdir(parents=True)
            break
    return candidate


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def check_place(settings: Settings, trained: int) -> None:
    """Check that a run's folder can be written, before any work is done.

    Args:
        settings: Settings of the run.
        trained: Bytes of the trained parameters.

    Raises:
        OSError: If it cannot be written, or the disk has too little room for the state and the adapter. Each is
            written beside the one it replaces.
    """
    folder = settings.resume or settings.out or Path("runs")
    # the values and AdamW's two moments, the best epoch's values, the moving average
    state = 3 + (settings.resolved_protocol != "final") + (settings.ema > 0)
    copies = 1 if settings.resume else 2
    needed = copies * (state + 1) * trained + OTHER_FILES
    try:
        check_writable(folder, needed)
    except OSError as error:
        raise OSError(
            error.errno, f"out: a run needs {in_units(needed)} for its state and adapter: {error.strerror}"
        ) from error


class RunFolder:
    """The folder of one run, new or resumed. Only the main process writes; all processes know the path.

    ``settings.out`` names a new folder, which must not exist; without it the folder is
    ``runs/<data>-<model>-<method>-seed<seed>``, with a number appended if that exists. The method of a rank above 1 is
    ``rlrr-r<rank>`` there.
    A new folder exists only after :meth:`begin`.

    Attributes:
        path: The folder.
        kept: Number of epochs in the state on disk.

    Raises:
        FileExistsError: If ``settings.out`` exists.
    """

    def __init__(self, settings: Settings, world: World) -> None:
        self.world, self.settings = world, settings
        if settings.resume is not None:
            self.path = settings.resume
        elif settings.out is not None:
            self.path = settings.out
            on_main(world, self._refuse_existing)
        else:
            data = settings.dataset.strip("/.").replace("/", "-")
            self.path = Path("runs") / f"{data}-{settings.model}-{settings.variant}-seed{settings.seed}"
        self.kept = 0
        self._events: Any = None
        self._wants_events = settings.tensorboard and world.main
        if settings.resume and world.main:
            _remove_partial_files(self.path)

    @property
    def adapter(self) -> Path:
        """The adapter's folder."""
        return self.path / ADAPTER

    def begin(self, state: State, metrics: dict[str, Any]) -> None:
        """Create the folder of a new run together with its first state and metrics, so that it can always be resumed.

        All processes must call this.

        Args:
            state: State before the first epoch.
            metrics: Contents of ``metrics.json``. ``"run"`` is set to the folder.

        Raises:
            FileExistsError: If ``settings.out`` was created in the meantime.
        """
        self.path = on_main(self.world, lambda: self._begin(state, metrics))
        metrics["run"] = str(self.path)

    def _begin(self, state: State, metrics: dict[str, Any]) -> Path:
        if self.settings.resume is not None:
            # an empty folder that the user made
            _fill(self.path, state, metrics)
            return self.path
        filled = self.path.with_name(f".{self.path.name}.{secrets.token_hex(6)}.partial")
        filled.mkdir(parents=True)
        try:
            for path in [self.path] if self.settings.out else _numbered(self.path):
                if os.path.lexists(path):
                    continue
                _fill(filled, state, metrics | {"run": str(path)})
                try:
                    os.rename(filled, path)
                except OSError:
                    # another run created its folder first; a folder with files in it cannot be replaced
                    if not os.path.lexists(path):
                        raise
                else:
                    return path
            raise self._exists()
        except BaseException:
            shutil.rmtree(filled, ignore_errors=True)
            raise

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise self._exists()

    def _exists(self) -> FileExistsError:
        return FileExistsError(f"out: {self.path} exists; a run never overwrites another")

    def describe(self) -> dict[str, Any]:
        """The entries of ``metrics.json`` that are known before training."""
        return {
            "run": str(self.path),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "settings": self.settings.to_dict(),
            "versions": versions(),
        }

    def write_state(self, state: State) -> None:
        """Write the state atomically."""
        if self.world.main:
            with self.writing():
                state.write(self.path)
        self.kept = state.record["epoch"]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error of a write into the folder, such as a full disk, into :class:`NotWritten`."""
        try:
            yield
        except OSError as error:
            raise NotWritten(
                error.errno,
                f"{error.strerror or error}; the folder keeps the run as it was after epoch {self.kept}: when it can "
                f"be written again, rlrr-finetune --resume {shlex.quote(str(self.path))} goes on from there",
            ) from error

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json`` atomically."""
        if self.world.main:
            with self.writing():
                _write_metrics(self.path, metrics)

    def write_events(self, epoch: dict[str, Any]) -> None:
        """Write an epoch's figures as TensorBoard events, if enabled and installed.

        Call it before :meth:`write_state`: a resumed run writes only events of epochs that are not in the state.
        """
        with self.writing():
            if self._events is None and self._wants_events:
                self._events = _event_writer(self.path, epoch["epoch"])
                self._wants_events = self._events is not None
            if self._events is not None:
                for name, value in epoch.items():
                    if name != "epoch":
                        self._events.add_scalar(name.replace("_", "/", 1), value, epoch["epoch"])
                self._events.flush()

    def write_curves(self, metrics: dict[str, Any]) -> None:
        """Write ``curves.png`` if there is an epoch to draw."""
        if self.world.main and metrics["epochs"]:
            with self.writing():
                write_atomically(self.path / "curves.png", draw_curves(metrics))

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._events is not None:
            # every epoch was flushed, so nothing is lost if this fails
            with suppress(OSError):
                self._events.close()

    def remove_state(self) -> None:
        """Remove the state, which a finished run does not need."""
        if self.world.main:
            shutil.rmtree(self.path / STATE.parent, ignore_errors=True)


def _fill(folder: Path, state: State, metrics: dict[str, Any]) -> None:
    state.write(folder)
    _write_metrics(folder, metrics)


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    write_atomically(folder / METRICS, (json.dumps(metrics, indent=2) + "\n").encode())


def _remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of a killed run."""
    for path in list(folder.rglob(".*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _event_writer(folder: Path, epoch: int) -> Any:
    """TensorBoard's writer, or None (and a warning) if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed: no event files are written", file=sys.stderr)
        return None
    # a killed run may have written events of an epoch that is not in its state: they are purged
    return SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)


def judged_by(epoch: dict[str, Any]) -> str:
    """The split by which an epoch is judged: ``val``, else ``test``, else ``train``."""
    return next(split for split in JUDGED_BY if f"{split}_loss" in epoch)


def draw_curves(metrics: dict[str, Any]) -> bytes:
    """Draw loss and accuracy over the epochs as a PNG, with the chosen epoch marked."""
    epochs = metrics["epochs"]
    x = [e["epoch"] for e in epochs]
    split, best = judged_by(epochs[0]), metrics.get("best_epoch")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, key, label in ((loss, "loss", "cross-entropy"), (accuracy, "accuracy", "accuracy")):
        axes.plot(x, [e[f"train_{key}"] for e in epochs], color="#888888", label="train")
        if split != "train":
            name = {"val": "validation", "test": "test (chosen on it)"}[split]
            axes.plot(x, [e[f"{split}_{key}"] for e in epochs], color=COLOURS["rlrr"], label=name)
        if best is not None:
            axes.axvline(best, color=COLOURS["rlrr"], lw=0.8, ls=":", label=f"chosen: epoch {best}")
        if f"test_{key}" in metrics:
            test = metrics[f"test_{key}"]
            axes.plot([best], [test], "o", color="#c0392b", label=f"test {test:.4f}")
        _finish(axes, label)
    settings = metrics["settings"]
    figure.suptitle(
        f"{settings['method']} on {settings['task'] or settings['data']}, {settings['model']}, "
        f"{metrics['trainable_parameters']:,} trained parameters, seed {settings['seed']}",
        fontsize=10,
    )
    return _png(figure)


def draw_comparison(runs: Sequence[dict[str, Any]]) -> bytes:
    """Draw the validation accuracy of several runs over the epochs as a PNG, one colour a method.

    Runs without validation are drawn by the split that :func:`judged_by` gives.
    """
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for run in runs:
        method = run["settings"]["method"]
        axes.plot(
            [e["epoch"] for e in run["epochs"]],
            [e[f"{judged_by(e)}_accuracy"] for e in run["epochs"]],
            color=COLOURS[method],
            alpha=0.8,
            label=None if method in labelled else f"{method}: {run['trainable_parameters']:,} trained parameters",
        )
        labelled.add(method)
    splits = {judged_by(e) for run in runs for e in run["epochs"]}
    _finish(axes, f"{' or '.join(name for split, name in JUDGED_BY.items() if split in splits)} accuracy")
    settings = runs[0]["settings"]
    axes.set_title(f"{settings['task'] or settings['data']}, {settings['model']}, a line a seed", fontsize=10)
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
