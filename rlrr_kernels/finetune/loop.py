"""A run: its data and model, its epochs by one of three protocols, its folder."""

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
from rlrr_kernels.finetune.data import Splits, is_path, load_splits, make_transform
from rlrr_kernels.finetune.distributed import choose_device
from rlrr_kernels.finetune.models import build_model, check_statistics, unknown
from rlrr_kernels.finetune.report import NotWritten, RunFolder, check_place
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.state import State, check_data, check_settings, read_state
from rlrr_kernels.finetune.trainer import Trainer
from rlrr_kernels.models.parameters import count_parameters

#: Protocol -> the split that is evaluated after each epoch and chooses the best; None: the last epoch counts.
CHOOSES = {"choose-epoch": "val", "final": None, "best-on-test": "test"}

ON_TEST = (
    "The epoch was chosen on the test images, as for the published figures: "
    "the test accuracy is the best of all epochs, and no estimate for new images."
)


def load_data(settings: Settings) -> Splits:
    """The dataset, resized and normalised as the model's configuration says.

    Raises:
        ValueError: timm has no configuration for the model. See also :func:`load_splits`.
    """
    try:
        pretrained_cfg = timm.get_pretrained_cfg(settings.model)
    except RuntimeError:  # a tag that the model has no weights of
        pretrained_cfg = None
    if pretrained_cfg is None:
        raise unknown(settings.model)
    config = resolve_data_config(pretrained_cfg=pretrained_cfg.to_dict())
    channels, *own_size = config["input_size"]
    size = [settings.img_size] * 2 if settings.img_size else own_size
    # the published FGVC pipeline takes its image library's default
    interpolation = "bilinear" if settings.resize == "crop" else config["interpolation"]
    shape = (channels, *size), config["mean"], config["std"], interpolation
    train = make_transform(*shape, flip=settings.flip, resize=settings.resize, train=True)
    return load_splits(settings, train, make_transform(*shape, resize=settings.resize, train=False))


def located(settings: Settings) -> Settings:
    """The same settings with absolute paths, so that a run can be continued and evaluated from any folder."""
    paths: dict[str, Any] = {
        name: path.absolute() for name in ("checkpoint", "data_root") if (path := getattr(settings, name)) is not None
    }
    if not settings.task and is_path(settings.data):
        paths["data"] = os.path.abspath(settings.data)
    return dataclasses.replace(settings, **paths)


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs were found and checked: nothing is written yet.

    Attributes:
        state: from where a resumed run goes on; None for a new one.
    """

    settings: Settings
    splits: Splits
    model: nn.Module
    device: torch.device
    state: State | None = None


def prepare(settings: Settings) -> Prepared:
    """Load the data and build the model; of a run to resume, read and check its state.

    Raises:
        ValueError, TypeError, FileNotFoundError: an input that is wrong or missing;
            see :func:`load_data`, :func:`build_model`, :func:`check_statistics`, :func:`read_state` and
            :func:`check_settings`.
        OSError: the run's folder cannot be written, or there is too little room, see :func:`check_place`.
    """
    settings = located(settings)
    state = read_state(settings.resume) if settings.resume else None
    if state:
        check_settings(state, settings)
        state.check("processes", distributed.launched().size)
    torch.manual_seed(settings.seed)
    device = choose_device(settings.device)
    splits = load_data(settings)
    if state:
        state.check("classes", splits.classes)
        state.check_names(splits.names)
        check_data(state.record, settings, splits)
    model = build_model(settings, splits.classes)
    check_statistics(model, settings)
    check_place(settings, sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad))
    return Prepared(settings, splits, model, device, state)


@dataclass
class Run:
    """A run in progress.

    Attributes:
        metrics: what ``metrics.json`` says.
        best: what trains, as it was at the epoch in the adapter folder.
    """

    trainer: Trainer
    folder: RunFolder
    metrics: dict[str, Any]
    best: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(cls, prepared: Prepared) -> Run:
        """A new folder, or that of the run to resume, as it was after the last whole epoch."""
        settings, splits = prepared.settings, prepared.splits
        trainer = Trainer(settings, prepared.model, splits, prepared.device)
        trains = "train" if settings.resolved_protocol == "choose-epoch" else "trainval"
        names = [trains, *(["val"] if trains == "train" else []), "test"]
        images = {name: len(getattr(splits, name)) for name in names}
        if prepared.state:
            prepared.state.check("images", images)
        folder = RunFolder(settings, trainer.world)
        run = cls(trainer, folder, {}, trainer.trained())
        if prepared.state:
            run.best = trainer.load(prepared.state)
            folder.kept = trainer.epoch
            run.metrics = prepared.state.record["metrics"]
            run.metrics.setdefault("resumed_after", []).append(trainer.epoch)
            # both may have been moved
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
        """What :func:`train` needs to go on from here. All processes must call it."""
        best = self.best if CHOOSES[self.metrics["protocol"]] and self.metrics["epochs"] else None
        names = ("settings", "processes", "images", "classes", "data_fingerprint")
        # a run that an older version began has none of the last
        agreed = {name: self.metrics[name] for name in names if name in self.metrics}
        return self.trainer.state(best, {**agreed, "metrics": self.metrics})

    def describe(self) -> dict[str, str]:
        """The adapter's metadata."""
        settings = self.trainer.settings
        return {
            "base_model": settings.model,
            "method": settings.method,
            "dataset": settings.dataset,
            "classes": str(self.metrics["classes"]),
            "epoch": str(self.metrics.get("best_epoch", 0)),
        }

    def save(self) -> None:
        """Write the adapter: what trains now, or its moving average. All processes must call it."""
        with self.folder.writing():
            # of a run that began before names were kept there are none: its adapter stays as it is
            self.trainer.save(self.folder.adapter, self.describe(), self.metrics.get("class_names"))


def train(prepared: Prepared, *, quiet: bool = False, test: bool = True) -> dict[str, Any]:
    """Fine-tune by the protocol of the settings, and write the run folder.

    The folder holds ``adapter`` (what trained, at the best epoch so far), ``metrics.json``,
    ``curves.png``, TensorBoard's event files where it is installed, and until the run is finished
    ``state``, from which it can be resumed. All but the curves are rewritten, each whole, after each
    epoch, so a killed run keeps them. Ctrl-C ends the run: the folder then holds what
    was reached, marked ``"interrupted": true``, with no test figure. After any other
    error ``metrics.json`` says what it was.

    Args:
        prepared: the run. Its model is left at the chosen epoch.
        quiet: no progress bar and no notes.
        test: False leaves the test images untouched, and the figures without a test.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: ``test=False`` with the protocol that chooses on the test images, or a state
            that does not fit the model or the data.
        FileExistsError: ``settings.out`` exists.
        FloatingPointError: the loss became infinite or NaN.
        RuntimeError: a trained parameter is bypassed by the model's code.
        NotWritten: the folder could not be written, as where a disk is full: says which epoch it keeps.
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
        # not in several processes: what is sharded would have to be gathered, and the others may be anywhere
        if run.trainer.world.size == 1 and not run.folder.adapter.exists():
            run.save()
    except Exception as error:
        run.metrics["error"] = f"{type(error).__name__}: {error}"
        # the folder itself may be what failed, and why it ended must be said all the same
        with contextlib.suppress(NotWritten):
            run.folder.write_metrics(run.metrics)
        raise
    finally:
        run.folder.close()
    run.folder.write_metrics(run.metrics)
    run.folder.write_curves(run.metrics)
    if not run.metrics["interrupted"]:
        # the last thing to be written: before it, the run can be resumed
        run.metrics["finished"] = True
        run.folder.write_metrics(run.metrics)
        run.folder.drop_state()
    return run.metrics


def _epochs(run: Run, quiet: bool) -> None:
    trainer, folder, metrics, settings = run.trainer, run.folder, run.metrics, run.trainer.settings
    split = CHOOSES[metrics["protocol"]]
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    # of a resumed run the adapter may be an epoch ahead of the state, or missing
    if metrics["epochs"]:
        current = trainer.trained()
        trainer.restore(run.best)
        run.save()
        trainer.restore(current)
    start = time.perf_counter() - metrics["train_seconds"]
    trainer.keep_images(split, quiet)
    epochs, steps = settings.total_epochs, trainer.batches.steps
    # a terminal is redrawn often, a log file gets a line now and then
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
    """Whether the last epoch is better than the best before it: by accuracy, then by loss."""
    *_, last = metrics["epochs"]
    best = metrics.get("best_epoch")
    if split is None or best is None:
        return True
    (new, old) = ((e[f"{split}_accuracy"], -e[f"{split}_loss"]) for e in (last, metrics["epochs"][best - 1]))
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
