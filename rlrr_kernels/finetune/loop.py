"""A run from its settings to its metrics: load the data, build the model, train by one of three protocols."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from rlrr_kernels.finetune import distributed
from rlrr_kernels.finetune.backbone import build_model, check_statistics, unknown_model
from rlrr_kernels.finetune.data import Splits, is_path, load_splits, make_transform
from rlrr_kernels.finetune.run_folder import NotWritten, RunFolder, State, check_place
from rlrr_kernels.finetune.saved_run import check_data, check_settings, check_state, read_state
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.trainer import Trainer
from rlrr_kernels.models.parameters import count_parameters

#: The split that is evaluated after each epoch and chooses the best one, by protocol. None: the last epoch counts.
CHOOSES = {"choose-epoch": "val", "final": None, "best-on-test": "test"}

ON_TEST = (
    "The epoch was chosen on the test images, as for the published figures: "
    "the test accuracy is the best of all epochs, and no estimate for new images."
)


def load_data(settings: Settings) -> Splits:
    """Load the dataset, resized and normalised for the model.

    Raises:
        ValueError: If timm does not know the model. See also :func:`load_splits`.
    """
    try:
        pretrained_cfg = timm.get_pretrained_cfg(settings.model)
    except RuntimeError:  # the model has no weights of this tag
        pretrained_cfg = None
    if pretrained_cfg is None:
        raise unknown_model(settings.model)
    config = resolve_data_config(pretrained_cfg=pretrained_cfg.to_dict())
    channels, *own_size = config["input_size"]
    size = [settings.img_size] * 2 if settings.img_size else own_size
    # the published FGVC pipeline uses the default of its image library
    interpolation = "bilinear" if settings.resize == "crop" else config["interpolation"]
    shape = (channels, *size), config["mean"], config["std"], interpolation
    train = make_transform(*shape, flip=settings.flip, resize=settings.resize, train=True)
    return load_splits(settings, train, make_transform(*shape, resize=settings.resize, train=False))


def with_absolute_paths(settings: Settings) -> Settings:
    """Make paths absolute, so that a run can be resumed and evaluated from any folder."""
    paths: dict[str, Any] = {
        name: path.absolute() for name in ("checkpoint", "data_root") if (path := getattr(settings, name)) is not None
    }
    if not settings.task and is_path(settings.data):
        paths["data"] = os.path.abspath(settings.data)
    return dataclasses.replace(settings, **paths)


@dataclass(frozen=True)
class Prepared:
    """The checked inputs of a run; nothing is written yet. ``state`` is that of a run to resume, or None."""

    settings: Settings
    splits: Splits
    model: nn.Module
    device: torch.device
    state: State | None = None


def prepare(settings: Settings) -> Prepared:
    """Load the data and build the model. To resume a run, also read and check its state.

    Raises:
        ValueError, TypeError, FileNotFoundError: If an input is wrong or missing; see :func:`load_data`,
            :func:`build_model`, :func:`check_statistics`, :func:`read_state` and :func:`check_settings`.
        OSError: If the run's folder cannot be written or the disk has too little room, see :func:`check_place`.
    """
    settings = with_absolute_paths(settings)
    state = read_state(settings.resume) if settings.resume else None
    if state:
        check_settings(state.record["settings"], settings, "the run to resume")
        check_state(state, processes=distributed.launched().size)
    torch.manual_seed(settings.seed)
    device = distributed.choose_device(settings.device)
    splits = load_data(settings)
    if state:
        check_state(state, classes=splits.classes)
        check_data(state.record, settings, splits)
    model = build_model(settings, splits.classes)
    check_statistics(model, settings)
    check_place(settings, sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    return Prepared(settings, splits, model, device, state)


@dataclass
class Run:
    """A run in progress.

    Attributes:
        metrics: Contents of ``metrics.json``.
        best: The trained parameters at the epoch in the adapter folder.
    """

    trainer: Trainer
    folder: RunFolder
    metrics: dict[str, Any]
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, prepared: Prepared) -> Run:
        """Create the folder of a new run, or continue the run to resume from its last whole epoch."""
        settings, splits = prepared.settings, prepared.splits
        trainer = Trainer(settings, prepared.model, splits, prepared.device)
        trains = "train" if settings.resolved_protocol == "choose-epoch" else "trainval"
        names = [trains, *(["val"] if trains == "train" else []), "test"]
        images = {name: len(getattr(splits, name)) for name in names}
        if prepared.state:
            check_state(prepared.state, images=images)
        folder = RunFolder(settings, trainer.world)
        run = cls(trainer, folder, {}, trainer.trained())
        if prepared.state:
            run.best = trainer.load(prepared.state)
            folder.kept = trainer.epoch
            run.metrics = prepared.state.record["metrics"]
            run.metrics.setdefault("resumed_after", []).append(trainer.epoch)
            # the folder and the data may have been moved
            run.metrics["run"] = str(folder.path)
            run.metrics["settings"] |= {name: settings.to_dict()[name] for name in ("data", "data_root")}
            folder.write_metrics(run.metrics)
            return run
        trainable, total = count_parameters(trainer.model)
        device = prepared.device
        run.metrics = folder.describe() | {
            "protocol": settings.resolved_protocol,
            **({"protocol_note": ON_TEST} if CHOOSES[settings.resolved_protocol] == "test" else {}),
            "task": settings.task,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": trainer.world.size,
            "images": images,
            "classes": splits.classes,
            "data_fingerprint": splits.fingerprint,
            "class_names": list(splits.names) if splits.names is not None else None,
            "trainable_parameters": trainable,
            "parameters": total,
            "epochs": [],
            "train_seconds": 0.0,
            "interrupted": False,
            "finished": False,
        }
        folder.begin(run.state(), run.metrics)
        return run

    def state(self) -> State:
        """Collect what is needed to resume here. All processes must call this."""
        best = self.best if CHOOSES[self.metrics["protocol"]] and self.metrics["epochs"] else None
        names = ("settings", "processes", "images", "classes", "data_fingerprint")
        recorded = {name: self.metrics[name] for name in names}
        return self.trainer.state(best, {**recorded, "metrics": self.metrics})

    def save(self) -> None:
        """Write the trained parameters, or their moving average, as the adapter. All processes must call this."""
        settings = self.trainer.settings
        metadata = {
            "base_model": settings.model,
            "method": settings.method,
            "dataset": settings.dataset,
            "classes": str(self.metrics["classes"]),
            "epoch": str(self.metrics.get("best_epoch", 0)),
        }
        with self.folder.writing():
            self.trainer.save(self.folder.adapter, metadata, self.metrics.get("class_names"))


def train(prepared: Prepared, *, quiet: bool = False, test: bool = True) -> dict[str, Any]:
    """Fine-tune by the protocol of the settings, and write the run folder.

    The folder holds ``adapter`` (the trained parameters at the best epoch so far), ``metrics.json``, ``curves.png``,
    TensorBoard events if that is installed, and until the run is finished ``state``, from which it can be resumed.
    All but the curves are written atomically after each epoch, so a killed run keeps them. Ctrl-C ends the run:
    the folder then holds the results so far, marked ``"interrupted": true``, without a test result. After any other
    error ``metrics.json`` has its message.

    Args:
        prepared: The run. Its model is left at the chosen epoch.
        quiet: Whether to print neither a progress bar nor notes.
        test: Whether to evaluate on the test images at the end.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: If ``test=False`` with the protocol that chooses on the test images, or the state does not fit
            the model or the data.
        FileExistsError: If ``settings.out`` exists.
        FloatingPointError: If the loss becomes infinite or NaN.
        RuntimeError: If a trained parameter gets no gradient.
        NotWritten: If the folder cannot be written, for example on a full disk. The message names the epoch it keeps.
    """
    protocol = prepared.settings.resolved_protocol
    if not test and CHOOSES[protocol] == "test":
        raise ValueError(f"test: expected True with protocol {protocol}, which tests after each epoch, got False")
    run = Run.begin(prepared)
    quiet = quiet or not run.trainer.world.main
    if not quiet and "protocol_note" in run.metrics:
        print(f"Note: {run.metrics['protocol_note']}", file=sys.stderr)
    try:
        with distributed.working():
            _epochs(run, quiet)
            run.trainer.restore(run.best)
            if test:
                _test(run)
    except KeyboardInterrupt:
        run.metrics["interrupted"] = True
        run.trainer.restore(run.best)
        # not with several processes: gathering shards needs all of them, and the others may be anywhere
        if run.trainer.world.size == 1 and not run.folder.adapter.exists():
            run.save()
    except Exception as error:
        run.metrics["error"] = f"{type(error).__name__}: {error}"
        # writing to the folder may be what failed: the error itself must be raised
        with contextlib.suppress(NotWritten):
            run.folder.write_metrics(run.metrics)
        raise
    finally:
        run.folder.close()
    run.folder.write_metrics(run.metrics)
    run.folder.write_curves(run.metrics)
    if not run.metrics["interrupted"]:
        # written last: until then the run can be resumed
        run.metrics["finished"] = True
        run.folder.write_metrics(run.metrics)
        run.folder.remove_state()
    return run.metrics


def _epochs(run: Run, quiet: bool) -> None:
    trainer, folder, metrics, settings = run.trainer, run.folder, run.metrics, run.trainer.settings
    split = CHOOSES[metrics["protocol"]]
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    # the adapter of a resumed run may be an epoch ahead of the state, or missing
    if metrics["epochs"]:
        current = trainer.trained()
        trainer.restore(run.best)
        run.save()
        trainer.restore(current)
    start = time.perf_counter() - metrics["train_seconds"]
    trainer.keep_images(split, quiet)
    epochs, steps = settings.total_epochs, trainer.batches.steps
    # redraw a terminal often, but write few lines to a log file
    interval = 0.1 if sys.stderr.isatty() else 15
    with tqdm(
        total=epochs * steps, initial=trainer.step, unit="step", disable=quiet, dynamic_ncols=True, mininterval=interval
    ) as bar:
        while trainer.epoch < epochs and not _stops(run):
            bar.set_description(f"{settings.method} epoch {trainer.epoch + 1}/{epochs}", refresh=False)
            figures: dict[str, Any] = {"epoch": trainer.epoch + 1, **trainer.train_epoch(bar)}
            with trainer.averaged():
                if split:
                    loss, accuracy = trainer.evaluate(getattr(trainer.splits, split))
                    figures |= {f"{split}_loss": loss, f"{split}_accuracy": accuracy}
                metrics["epochs"].append(figures)
                metrics["train_seconds"] = time.perf_counter() - start
                if _is_best(metrics, split):
                    metrics["best_epoch"] = figures["epoch"]
                    run.best = trainer.trained()
                    run.save()
            folder.write_events(figures)
            folder.write_state(run.state())
            folder.write_metrics(metrics)
    if cuda:
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.device)


def _is_best(metrics: dict[str, Any], split: str | None) -> bool:
    """Whether the last epoch is better than the best before it, by accuracy, then by loss."""
    best = metrics.get("best_epoch")
    if split is None or best is None:
        return True
    epochs = metrics["epochs"]
    new, old = ((e[f"{split}_accuracy"], -e[f"{split}_loss"]) for e in (epochs[-1], epochs[best - 1]))
    return new > old


def _stops(run: Run) -> bool:
    patience, metrics = run.trainer.settings.early_stop, run.metrics
    if not patience or run.trainer.epoch - metrics.get("best_epoch", 0) < patience:
        return False
    metrics["stopped_early"] = True
    return True


def _test(run: Run) -> None:
    metrics, splits = run.metrics, run.trainer.splits
    if CHOOSES[metrics["protocol"]] == "test":
        best = metrics["epochs"][metrics["best_epoch"] - 1]
        metrics |= {name: best[name] for name in ("test_loss", "test_accuracy")}
        return
    loss, accuracy = run.trainer.evaluate(splits.test)
    metrics |= {"test_loss": loss, "test_accuracy": accuracy}
