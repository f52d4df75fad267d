"""The training loop: choose the epoch on validation, report the test set once."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from rlrr_kernels.adapt import count_parameters, param_groups
from rlrr_kernels.checkpoint import load_adapter, save_adapter
from rlrr_kernels.finetune.data import ImageSet, Splits, load_splits, make_transform
from rlrr_kernels.finetune.models import build_model
from rlrr_kernels.finetune.report import RunFolder
from rlrr_kernels.finetune.settings import Settings


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU where there is none. ``ValueError`` for a device that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_data(settings: Settings) -> Splits:
    """The dataset, resized and normalised as the model's configuration says.

    Raises:
        ValueError: timm has no configuration for the model. See also :func:`load_splits`.
    """
    pretrained_cfg = timm.get_pretrained_cfg(settings.model)
    if pretrained_cfg is None:
        raise ValueError(f"model: timm does not know {settings.model!r} (timm.list_models() lists them)")
    config = resolve_data_config(pretrained_cfg=pretrained_cfg.to_dict())
    shape = config["input_size"], config["mean"], config["std"], config["interpolation"]
    train, plain = make_transform(*shape, flip=settings.flip), make_transform(*shape)
    return load_splits(settings.data, settings.data_root, settings.seed, train, plain)


class Trainer:
    """One model, its optimiser and schedule, and the loaders."""

    def __init__(self, settings: Settings, model: nn.Module, splits: Splits, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.model = model.to(device)
        self.train_loader = self._loader(splits.train, shuffle=True)
        self.splits = splits
        groups = param_groups(model, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        steps = len(self.train_loader)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=settings.epochs * steps,
            lr_min=settings.min_lr,
            warmup_t=settings.warmup_epochs * steps,
            warmup_lr_init=settings.warmup_lr,
            t_in_epochs=False,
        )
        self.step = 0

    def _loader(self, images: ImageSet, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=self.settings.batch_size,
            shuffle=shuffle,
            num_workers=self.settings.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.settings.seed),
        )

    def _logits(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            return self.model(images.to(self.device, non_blocking=True)).float()

    def train_epoch(self, bar: tqdm[Any]) -> dict[str, float]:
        """One pass over the training images; returns mean loss, accuracy, last lr and images/s."""
        self.model.train()
        start, seen = time.perf_counter(), 0
        loss_sum, hits = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for images, labels in self.train_loader:
            self.scheduler.step_update(self.step)
            labels = labels.to(self.device, non_blocking=True)
            logits = self._logits(images)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if self.step == 0:
                self._check_gradients()
            self.optimizer.step()
            self.step += 1
            seen += len(labels)
            loss_sum += loss.detach() * len(labels)
            hits += (logits.argmax(1) == labels).sum()
            bar.update()
            # reading a result waits for the GPU, so not at every step
            if self.step % 10 == 0 or self.step % len(self.train_loader) == 0:
                mean = loss_sum.item() / seen
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss is {mean} at step {self.step}; try a smaller --lr")
                rate = seen / (time.perf_counter() - start)
                bar.set_postfix_str(
                    f"loss {mean:.3f}, acc {hits.item() / seen:.3f}, {rate:.0f} images/s", refresh=False
                )
        return {
            "train_loss": loss_sum.item() / seen,
            "train_accuracy": hits.item() / seen,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": seen / (time.perf_counter() - start),
        }

    def _check_gradients(self) -> None:
        """A model that reads ``layer.weight`` itself bypasses u, v and f, which would then never train."""
        untouched = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if untouched:
            raise RuntimeError(
                f"{len(untouched)} trained parameters get no gradient, {untouched[0]} among them: "
                f"{type(self.model).__name__} does not call these layers as modules"
            )

    @torch.no_grad()
    def evaluate(self, images: ImageSet) -> tuple[float, float]:
        """(mean cross-entropy, accuracy) over a split."""
        self.model.eval()
        loss_sum, hits = 0.0, 0
        for batch, labels in self._loader(images):
            logits, labels = self._logits(batch), labels.to(self.device)
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            hits += int((logits.argmax(1) == labels).sum())
        return loss_sum / len(images), hits / len(images)

    def trained(self) -> dict[str, Tensor]:
        """A copy of what trains."""
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what :meth:`trained` returned."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs were found and checked: nothing is written yet."""

    settings: Settings
    splits: Splits
    model: nn.Module
    device: torch.device


def prepare(settings: Settings) -> Prepared:
    """Load the data and build the model.

    Raises:
        ValueError, TypeError, FileNotFoundError: an input that is wrong or missing;
            see :func:`load_data` and :func:`build_model`.
    """
    torch.manual_seed(settings.seed)
    device = choose_device(settings.device)
    splits = load_data(settings)
    return Prepared(settings, splits, build_model(settings, splits.classes), device)


def train(prepared: Prepared, *, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune, choose the epoch on validation, report test once, write the run folder.

    The folder holds ``adapter.safetensors`` (what trained, at the best epoch so far),
    ``metrics.json`` and ``curves.png``; the first two are rewritten whole after each
    epoch, so a killed run keeps them. Ctrl-C ends the run: the folder then holds what
    was reached, marked ``"interrupted": true``, with no test figure. After any other
    error ``metrics.json`` says what it was.

    Args:
        prepared: the run. Its model is left at the chosen epoch.
        quiet: no progress bar.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        FileExistsError: ``settings.out`` exists.
        FloatingPointError: the loss became infinite or NaN.
        RuntimeError: a trained parameter is bypassed by the model's code.
    """
    settings, splits, model, device = prepared.settings, prepared.splits, prepared.model, prepared.device
    trainer = Trainer(settings, model, splits, device)
    folder = RunFolder(settings)
    trainable, total = count_parameters(model)
    metrics: dict[str, Any] = folder.metrics | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "images": {name: len(getattr(splits, name)) for name in ("train", "val", "test")},
        "classes": splits.classes,
        "trainable_parameters": trainable,
        "parameters": total,
        "epochs": [],
        "interrupted": False,
    }
    try:
        _epochs(trainer, folder, metrics, quiet)
    except KeyboardInterrupt:
        metrics["interrupted"] = True
        if folder.adapter.exists():
            load_adapter(model, folder.adapter)
        else:
            save_adapter(model, folder.adapter, _describe(settings, splits, 0))
    except Exception as error:
        metrics["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        folder.write_metrics(metrics)
    folder.write_curves(metrics)
    return metrics


def _describe(settings: Settings, splits: Splits, epoch: int) -> dict[str, str]:
    return {
        "base_model": settings.model,
        "method": settings.method,
        "classes": str(splits.classes),
        "epoch": str(epoch),
    }


def _epochs(trainer: Trainer, folder: RunFolder, metrics: dict[str, Any], quiet: bool) -> None:
    settings, splits, cuda = trainer.settings, trainer.splits, trainer.device.type == "cuda"
    best, best_key = trainer.trained(), (-1.0, 0.0)
    start = time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    total_steps = settings.epochs * len(trainer.train_loader)
    # a terminal is redrawn often, a log file gets a line now and then
    interval = 0.1 if sys.stderr.isatty() else 15
    with tqdm(total=total_steps, unit="step", disable=quiet, dynamic_ncols=True, mininterval=interval) as bar:
        for epoch in range(1, settings.epochs + 1):
            bar.set_description(f"{settings.method} epoch {epoch}/{settings.epochs}", refresh=False)
            figures = trainer.train_epoch(bar)
            val_loss, val_accuracy = trainer.evaluate(splits.val)
            metrics["epochs"].append({"epoch": epoch, **figures, "val_loss": val_loss, "val_accuracy": val_accuracy})
            metrics["train_seconds"] = time.perf_counter() - start
            if (val_accuracy, -val_loss) > best_key:
                best, best_key = trainer.trained(), (val_accuracy, -val_loss)
                save_adapter(trainer.model, folder.adapter, _describe(settings, splits, epoch))
                metrics["best_epoch"] = epoch
            folder.write_metrics(metrics)
    if cuda:
        metrics["peak_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.device)
    trainer.restore(best)
    test_loss, test_accuracy = trainer.evaluate(splits.test)
    metrics |= {"test_loss": test_loss, "test_accuracy": test_accuracy}
