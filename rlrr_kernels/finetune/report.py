"""The run folder: metrics as JSON, curves as a picture, nothing overwritten."""

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
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlrr_kernels.checkpoint import write_atomically
from rlrr_kernels.finetune.distributed import World, on_main
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.state import FILE, State
from rlrr_kernels.io.files import check_writable, in_units

COLOURS = {"rlrr": "#1f5fa8", "linear": "#d08a1d", "full": "#5a9153", "ssf": "#8c6bb1", "lora": "#b0506a"}
PACKAGES = ("rlrr_kernels", "torch", "triton", "timm", "torchvision", "numpy", "scikit-learn")


#: Bytes for metrics, curves and TensorBoard's files.
ROOM = 4 * 2**20


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
    for candidate in _numbered(path):
        try:
            candidate.mkdir(parents=True)
            break
        except FileExistsError:
            continue
    return candidate


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


class NotWritten(OSError):
    """A file of a run in progress could not be written; says what was kept and how to go on."""


def check_place(settings: Settings, trained: int) -> None:
    """See that a run's folder can be written, before any work.

    Args:
        settings: of the run.
        trained: bytes of what trains.

    Raises:
        OSError: it cannot, or there is less room than state and adapter will need, each beside the one it replaces.
    """
    folder = settings.resume or settings.out or Path("runs")
    # the values, AdamW's two moments, the best epoch's, the average
    state = 3 + (settings.resolved_protocol != "final") + (settings.ema > 0)
    copies = 1 if settings.resume else 2
    needed = copies * (state + 1) * trained + ROOM
    try:
        check_writable(folder, needed)
    except OSError as error:
        raise OSError(
            error.errno, f"out: a run needs {in_units(needed)} for its state and adapter: {error.strerror}"
        ) from error


class RunFolder:
    """The folder of one run, new or resumed. Only the main process writes; all know the path.

    ``settings.out`` names a new one, and must not exist; without it the folder is
    ``runs/<data>-<model>-<method>-seed<seed>``, with a number where that is taken.
    A new one is there from :meth:`begin` on.

    Raises:
        FileExistsError: ``settings.out`` exists.
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
            self.path = Path("runs") / f"{data}-{settings.model}-{settings.method}-seed{settings.seed}"
        #: Epochs in the state that is on disk.
        self.kept = 0
        self._events: Any = None
        self._wants_events = settings.tensorboard and world.main
        if settings.resume and world.main:
            _sweep_up(self.path)

    @property
    def adapter(self) -> Path:
        """Where what was trained goes."""
        return self.path / "adapter"

    def begin(self, state: State, metrics: dict[str, Any]) -> None:
        """Make the folder of a new run with the first state and metrics in it, all at once.

        So the folder of a run can be resumed from whenever it is there. All processes must call it.

        Args:
            state: before the first epoch.
            metrics: what :meth:`describe` gave and more; ``"run"`` is set to where the folder is.

        Raises:
            FileExistsError: ``settings.out`` exists by now.
        """
        self.path = on_main(self.world, lambda: self._begin(state, metrics))
        metrics["run"] = str(self.path)

    def _begin(self, state: State, metrics: dict[str, Any]) -> Path:
        if self.settings.resume is not None:
            # somebody's empty folder
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
                    # another run was faster: its folder is not empty, so it cannot be replaced
                    if not os.path.lexists(path):
                        raise
                else:
                    return path
            raise self._taken()
        except BaseException:
            shutil.rmtree(filled, ignore_errors=True)
            raise

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.path):
            raise self._taken()

    def _taken(self) -> FileExistsError:
        return FileExistsError(f"out: {self.path} exists; a run never overwrites another")

    def describe(self) -> dict[str, Any]:
        """What ``metrics.json`` says before anything was trained."""
        return {
            "run": str(self.path),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
            "settings": self.settings.to_dict(),
            "versions": versions(),
        }

    def write_state(self, state: State) -> None:
        """Write what a continuation needs, whole."""
        if self.world.main:
            with self.writing():
                state.write(self.path)
        self.kept = state.record["epoch"]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around whatever is written into the folder of a run in progress: a full disk is told as what it means."""
        try:
            yield
        except OSError as error:
            raise NotWritten(
                error.errno,
                f"{error.strerror or error}; the folder keeps the run as it was after epoch {self.kept}: when it can "
                f"be written again, rlrr-finetune --resume {shlex.quote(str(self.path))} goes on from there",
            ) from error

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write ``metrics.json``, whole."""
        if self.world.main:
            with self.writing():
                _write_metrics(self.path, metrics)

    def write_events(self, epoch: dict[str, Any]) -> None:
        """Add an epoch's figures to TensorBoard's files, if they are wanted and it is installed.

        To be called before :meth:`write_state`: what a continuation does not train again it does not write again.
        """
        with self.writing():
            self._write_events(epoch)

    def _write_events(self, epoch: dict[str, Any]) -> None:
        if self._events is None and self._wants_events:
            # an epoch that a killed run wrote without its state comes again: TensorBoard is told to drop the first
            self._events = _event_writer(self.path, epoch["epoch"])
            self._wants_events = self._events is not None
        if self._events is not None:
            for name, value in epoch.items():
                if name != "epoch":
                    self._events.add_scalar(name.replace("_", "/", 1), value, epoch["epoch"])
            self._events.flush()

    def write_curves(self, metrics: dict[str, Any]) -> None:
        """Write ``curves.png``, if there is an epoch to draw."""
        if self.world.main and metrics["epochs"]:
            with self.writing():
                write_atomically(self.path / "curves.png", draw_curves(metrics))

    def close(self) -> None:
        """Close TensorBoard's file; no more epochs come in this process."""
        if self._events is not None:
            # each epoch's figures were flushed, or were said not to be written: there is nothing to lose here
            with suppress(OSError):
                self._events.close()

    def drop_state(self) -> None:
        """Remove what only an unfinished run needs."""
        if self.world.main:
            shutil.rmtree(self.path / FILE.parent, ignore_errors=True)


def _fill(folder: Path, state: State, metrics: dict[str, Any]) -> None:
    state.write(folder)
    _write_metrics(folder, metrics)


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    write_atomically(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())


def _sweep_up(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for path in list(folder.rglob(".*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _event_writer(folder: Path, epoch: int) -> Any:
    """TensorBoard's writer from an epoch on, or None and a line that says so where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed: no event files are written", file=sys.stderr)
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=epoch)


#: Which split an epoch may be judged by, in this order.
WATCHED = ("val", "test", "train")


def watched(epoch: dict[str, Any]) -> str:
    """``val``, or of an epoch without validation ``test`` or ``train``."""
    return next(split for split in WATCHED if f"{split}_loss" in epoch)


def draw_curves(metrics: dict[str, Any]) -> bytes:
    """Loss and accuracy over the epochs as a PNG; the chosen epoch is marked."""
    epochs = metrics["epochs"]
    x = [e["epoch"] for e in epochs]
    split = watched(epochs[0])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for axes, key, label in ((loss, "loss", "cross-entropy"), (accuracy, "accuracy", "accuracy")):
        axes.plot(x, [e[f"train_{key}"] for e in epochs], color="#888888", label="train")
        if split != "train":
            name = {"val": "validation", "test": "test (chosen on it)"}[split]
            axes.plot(x, [e[f"{split}_{key}"] for e in epochs], color=COLOURS["rlrr"], label=name)
        best = metrics.get("best_epoch")
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
    """Validation accuracy over the epochs, a line a run and a colour a method, as a PNG.

    Runs without validation are drawn by what they have instead, see :func:`watched`.
    """
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    labelled: set[str] = set()
    for run in runs:
        method = run["settings"]["method"]
        axes.plot(
            [e["epoch"] for e in run["epochs"]],
            [e[f"{watched(e)}_accuracy"] for e in run["epochs"]],
            color=COLOURS[method],
            alpha=0.8,
            label=None if method in labelled else f"{method}: {run['trainable_parameters']:,} trained parameters",
        )
        labelled.add(method)
    splits = {watched(e) for run in runs for e in run["epochs"]}
    names = {"val": "validation", "test": "test", "train": "training"}
    _finish(axes, f"{' or '.join(names[split] for split in WATCHED if split in splits)} accuracy")
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
