"""One model in training: its optimiser, schedule and loaders, in one process or as one of several."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from tqdm import tqdm

from rlrr_kernels.checkpoint import save_adapter
from rlrr_kernels.finetune import distributed
from rlrr_kernels.finetune.augment import Mixing
from rlrr_kernels.finetune.batches import Batch, Batches, keyed_seed
from rlrr_kernels.finetune.data import ImageSet, Splits, loading
from rlrr_kernels.finetune.ema import Average
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.state import State
from rlrr_kernels.io.reading import expect
from rlrr_kernels.models.parameters import param_groups

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


#: Share of an epoch's time spent waiting for images above which the progress line says so.
BOTTLENECK = 0.25


class Trainer:
    """Epochs of training and evaluation, and all that a continuation of them needs.

    Every draw is keyed, not carried: the order by seed and epoch, mixing by seed and step, drop path by
    seed, epoch and process. So there is no random state to save, and none that other code could move.

    Args:
        settings: of the run.
        model: as :func:`~rlrr_kernels.finetune.models.build_model` gives it, with equal values in all processes.
        splits: the protocol says which of them trains.
        device: this process's.

    Attributes:
        epoch, step: how many were done.
        parameters: name -> what trains; sharded where ``settings.parallel`` is ``fsdp``.
    """

    def __init__(self, settings: Settings, model: nn.Module, splits: Splits, device: torch.device) -> None:
        self.settings, self.device, self.splits = settings, device, splits
        self.world = distributed.start(device)
        self.model = model.to(device)
        self.wrapped = distributed.wrap(self.model, self.world, settings.parallel, device)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

        self.images = splits.train if settings.resolved_protocol == "choose-epoch" else splits.trainval
        self.batches = Batches(
            len(self.images),
            settings.batch_size,
            self.world,
            accumulation=settings.grad_accumulation,
            seed=settings.seed,
        )
        self.mixing = Mixing(settings, splits.classes)
        # one kernel for all that trains, where there are hundreds of small tensors; not for sharded ones
        self.fused = settings.parallel != "fsdp" and device.type in ("cpu", "cuda", "mps", "xpu")
        self.optimizer = torch.optim.AdamW(
            param_groups(self.model, settings.weight_decay), lr=settings.lr, fused=self.fused or None
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.average = Average(self.parameters, settings.ema) if settings.ema else None
        steps, cycle = self.batches.steps, settings.restart_epochs or settings.epochs
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=cycle * steps,
            cycle_mul=settings.restart_factor,
            # after whole equal cycles comes the cool-down; where there is none, the end of the epochs may cut the last
            cycle_limit=-(-settings.epochs // cycle),
            lr_min=settings.min_lr,
            warmup_t=settings.warmup_epochs * steps,
            warmup_lr_init=settings.warmup_lr,
            t_in_epochs=False,
        )
        self.epoch = self.step = 0
        self._checked = False

    def keep_images(self, chooses: str | None, quiet: bool) -> None:
        """Decode once what more than one epoch will see: the training images, and those of the split ``chooses``,
        as far as ``settings.cache`` reaches. All processes must call it alike.
        """
        if self.settings.total_epochs - self.epoch < 2 or not self.settings.cache:
            return
        room = int(self.settings.cache * 2**30)
        for images in [self.images, *([getattr(self.splits, chooses)] if chooses else [])]:
            room -= loading.keep(images, self.world, self.settings.workers, room, quiet=quiet)

    def _load(self, images: ImageSet, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        return loading.batches(images, batches, self.device, self.settings.workers)

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        dtype = AUTOCAST[self.settings.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return model(images).float()

    def train_epoch(self, bar: tqdm[Any]) -> dict[str, float]:
        """One pass over the training images.

        Returns:
            Mean loss and accuracy over all processes (of mixed images: by the larger share), the last
            learning rate, and images a second.

        Raises:
            FloatingPointError: the loss became infinite or NaN.
            RuntimeError: a trained parameter is bypassed by the model's code.
        """
        self.model.train()
        torch.manual_seed(keyed_seed("drop path", self.settings.seed, self.epoch, self.world.rank))
        self.batches.epoch = self.epoch
        start, seen, number, waited = time.perf_counter(), 0, 0, 0.0
        loaded = self._load(self.images, self.batches)
        loss_sum, hits = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        mean = accuracy = math.nan
        for batch in self.batches.plan():
            waits = time.perf_counter()
            images, labels = next(loaded)
            waited += time.perf_counter() - waits
            if number == 0:
                self.scheduler.step_update(self.step)
                self.optimizer.zero_grad(set_to_none=True)
            batch_loss, batch_hits = self._backward(batch, images, labels, number)
            loss_sum += batch_loss
            hits += batch_hits
            number += 1
            if not batch.last:
                continue
            self._update()
            number = 0
            seen += batch.step_images
            bar.update()
            # reading a result waits for the GPU and for other processes, so not at every step
            if self.step % 10 == 0 or self.step % self.batches.steps == 0:
                sums = distributed.total(self.world, loss_sum, hits, device=self.device)
                mean, accuracy = (value / seen for value in sums)
                if not math.isfinite(mean):
                    raise FloatingPointError(f"loss is {mean} at step {self.step}; try a smaller --lr")
                seconds = time.perf_counter() - start
                line = f"loss {mean:.3f}, acc {accuracy:.3f}, {seen / seconds:.0f} images/s"
                if waited > BOTTLENECK * seconds:
                    line += f", {waited / seconds:.0%} of the time waiting for images"
                bar.set_postfix_str(line, refresh=False)
        self.epoch += 1
        return {
            "train_loss": mean,
            "train_accuracy": accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": seen / (time.perf_counter() - start),
        }

    def _backward(self, batch: Batch, images: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Add this batch's share of the step's gradient; (sum of losses, hits) of its images that count."""
        labels = labels.to(self.device, non_blocking=True)
        images, targets = self.mixing(images, labels, self.step, number)
        with distributed.synchronising(self.wrapped, batch.last):
            logits = self._logits(self.wrapped, images)[: batch.counts]
            targets = targets[: batch.counts]
            # mixing has smoothed its targets already
            smoothing = 0.0 if self.mixing.on else self.settings.label_smoothing
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            # the mean over the images of the whole step: gradients are averaged over processes, and parts may be uneven
            self.scaler.scale(loss * (self.world.size / batch.step_images)).backward()
        classes = targets.argmax(1) if targets.ndim == 2 else targets
        return loss.detach(), (logits.argmax(1) == classes).sum()

    def _update(self) -> None:
        if not self._checked:
            self._check_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update()
        self.step += 1

    def _check_gradients(self) -> None:
        """A model that reads ``layer.weight`` itself bypasses u, v and f, which would then never train."""
        untouched = [name for name, p in self.parameters.items() if p.grad is None]
        if untouched:
            raise RuntimeError(
                f"{len(untouched)} trained parameters get no gradient, {untouched[0]} among them: "
                f"{type(self.model).__name__} does not call these layers as modules"
            )
        self._checked = True

    @torch.no_grad()
    def evaluate(self, images: ImageSet) -> tuple[float, float]:
        """(mean cross-entropy, accuracy) over a split, each image once however many processes share it."""
        self.model.eval()
        batches = Batches(len(images), self.settings.batch_size, self.world)
        loss_sum, hits = torch.zeros((), dtype=torch.float64), 0
        for batch, (inputs, labels) in zip(batches.plan(), self._load(images, batches), strict=True):
            logits = self._logits(self.model, inputs)[: batch.counts].cpu()
            labels = labels[: batch.counts]
            loss_sum += F.cross_entropy(logits, labels, reduction="sum")
            hits += int((logits.argmax(1) == labels).sum())
        loss, right = distributed.total(self.world, loss_sum, float(hits), device=self.device)
        return loss / len(images), right / len(images)

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds the moving average inside, if one is kept: what is evaluated and saved."""
        return self.average.in_place() if self.average else nullcontext()

    def trained(self) -> dict[str, Tensor]:
        """A copy of what trains (of sharded parameters, this process's part)."""
        return {name: distributed.local(p.detach()).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`trained` returned."""
        for name, value in values.items():
            distributed.local(self.parameters[name].detach()).copy_(value)

    def save(self, folder: Path, metadata: Mapping[str, str], class_names: Sequence[str] | None) -> None:
        """Write what trains as an adapter, from the main process. All processes must call it."""
        # of sharded parameters each process has a part to give
        if self.world.main or isinstance(self.model, FSDPModule):
            save_adapter(self.model, folder, metadata, class_names=class_names)

    def _whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: distributed.gather(part, self.parameters[name]) for name, part in parts.items()}

    def state(self, best: Mapping[str, Tensor] | None, record: dict[str, Any]) -> State:
        """Everything from which :meth:`load` goes on. All processes must call it.

        Args:
            best: what :meth:`trained` returned at the chosen epoch; None where it is the last.
            record: JSON values to keep with it.
        """
        tensors = {f"trained/{k}": t for k, t in self._whole(self.trained()).items()}
        if best is not None:
            tensors |= {f"best/{k}": t for k, t in self._whole(best).items()}
        if self.average:
            tensors |= {f"average/{k}": t for k, t in self._whole(self.average.values).items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                # all moments are as the parameter; the count of steps is one number
                tensors[f"optimizer/{name}/{key}"] = value if key == "step" else distributed.gather(value, parameter)
        return State({"epoch": self.epoch, "scaler": self.scaler.state_dict(), **record}, tensors)

    def load(self, state: State) -> dict[str, Tensor]:
        """Go on from a state.

        Returns:
            ``best`` as :meth:`state` was given it, or where it was None what trains now.

        Raises:
            ValueError: it is of another model.
        """
        self._check(state)
        self._put(state.part("trained"))
        moments: dict[str, dict[str, Tensor]] = {}
        for key, value in state.part("optimizer").items():
            name, _, moment = key.rpartition("/")
            moments.setdefault(name, {})[moment] = value
        for name, found in moments.items():
            parameter = self.parameters[name]
            self.optimizer.state[parameter] = {
                key: distributed.scatter(value, parameter) for key, value in found.items() if key != "step"
            }
            # the fused step counts where the parameter is
            self.optimizer.state[parameter]["step"] = found["step"].to(parameter.device if self.fused else "cpu")
        if self.average:
            for name, value in state.part("average").items():
                part = distributed.local(distributed.scatter(value, self.parameters[name]))
                self.average.values[name].copy_(part)
        if state.record["scaler"]:
            self.scaler.load_state_dict(state.record["scaler"])
        self.epoch = state.record["epoch"]
        self.step = self.epoch * self.batches.steps
        best = state.part("best")
        if not best:
            with self.averaged():
                return self.trained()
        return {k: distributed.local(distributed.scatter(t, self.parameters[k])) for k, t in best.items()}

    def _check(self, state: State) -> None:
        """``ValueError`` unless :meth:`load` could take all of a state: nothing is copied of one that it could not."""
        own = {name: (tuple(p.shape), p.dtype) for name, p in self.parameters.items()}
        for part in ("trained", "best", "average"):
            found = {name: (tuple(t.shape), t.dtype) for name, t in state.part(part).items()}
            # nothing is best before the first epoch, or where the last epoch counts; an average is kept from the start
            optional = part == "best" or (part == "average" and self.average is None)
            if found != own and not (optional and not found):
                raise ValueError(
                    "resume: the state is of a model whose trained parameters have other names or shapes, or it is "
                    f"damaged: {part}"
                )
        moments = state.part("optimizer")
        # before the first step there are none; after it, those of all that has had a gradient, which is everything
        wanted = {
            f"{name}/{key}": ((), torch.float32) if key == "step" else of_parameter
            for name, of_parameter in own.items()
            for key in (("step", "exp_avg", "exp_avg_sq") if moments else ())
        }
        if {name: (tuple(t.shape), t.dtype) for name, t in moments.items()} != wanted:
            raise ValueError("resume: the state is of another optimiser, or damaged: optimizer")
        scaler, expected = state.record["scaler"], self.scaler.state_dict()
        if scaler.keys() != expected.keys():
            raise ValueError(f"resume: scaler: expected {', '.join(expected) or 'nothing'}, got {', '.join(scaler)}")
        for name, value in expected.items():
            expect(scaler, name, type(value), least=0)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        self.restore({k: distributed.local(distributed.scatter(t, self.parameters[k])) for k, t in values.items()})
