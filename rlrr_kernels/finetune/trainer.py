"""Training one model: optimiser, schedule, batches, moving average, in one or several processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as compiler
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from tqdm import tqdm

from rlrr_kernels.checkpoint import save_adapter
from rlrr_kernels.finetune import distributed
from rlrr_kernels.finetune.batches import Batch, Batches, Mixing, keyed_seed
from rlrr_kernels.finetune.data import ImageSet, Splits, loading
from rlrr_kernels.finetune.evaluation import evaluate, logits_of
from rlrr_kernels.finetune.run_folder import State
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.checks import expect
from rlrr_kernels.models.parameters import param_groups

#: Share of activations that a compiled model keeps; the cheapest, what GELU and LayerNorm return, are formed again.
ACTIVATION_BUDGET = 0.9

#: The progress line reports waiting for images above this share of an epoch's time.
BOTTLENECK = 0.25


class Average:
    """An exponential moving average of the trained parameters, starting at their initial values.

    average = decay * average + (1 - decay) * value after each step.

    Args:
        parameters: Trained parameters by name; of sharded ones this process's part is averaged.
        decay: In [0, 1).

    Attributes:
        values: Averages by name, in the parameter's shape and dtype and on its device.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.parameters = {name: distributed.local(p.detach()) for name, p in parameters.items()}
        self.values = {name: p.clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Add the parameters' values after a step."""
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the model's values by the averages inside the context."""
        own = {name: p.clone() for name, p in self.parameters.items()}
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)


class Trainer:
    """Trains and evaluates a model by epochs, and saves and loads everything that a resumed run needs.

    All random draws are seeded by their place: the order by seed and epoch, mixing by seed and step, drop path by
    seed, epoch and process. So there is no random state to save.

    Args:
        settings: Settings of the run.
        model: From :func:`~rlrr_kernels.finetune.backbone.build_model`, with equal values in all processes.
        splits: The data. The protocol decides which split trains.
        device: This process's device.

    Attributes:
        epoch: Number of finished epochs.
        step: Number of finished steps.
        parameters: Trained parameters by name; sharded if ``settings.parallel`` is ``fsdp``.
    """

    def __init__(self, settings: Settings, model: nn.Module, splits: Splits, device: torch.device) -> None:
        self.settings, self.device, self.splits = settings, device, splits
        self.world = distributed.start(device)
        self.model = model.to(device)
        self.wrapped = distributed.wrap(self.model, self.world, settings.parallel, device)
        self.forward: Any = self.wrapped
        if settings.compile:
            # shapes are fixed but for the last batch of an epoch, which is compiled once, too
            compiled = torch.compile(self.wrapped, mode=settings.compile, dynamic=False)
            # PyTorch cannot weigh what a sharded model keeps
            budget = 1.0 if settings.parallel == "fsdp" else ACTIVATION_BUDGET
            self.forward = compiler.patch(activation_memory_budget=budget)(lambda images: compiled(images))
            if device.type == "cpu":
                import torch._inductor.config as inductor  # takes a second

                # its own random numbers are drawn one by one there, in the loops that dropout is fused with
                self.forward = inductor.patch(fallback_random=True)(self.forward)
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
        # one kernel for hundreds of small parameters; does not support sharded ones
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
            # without a cool-down, the end of the epochs may cut the last cycle
            cycle_limit=-(-settings.epochs // cycle),
            lr_min=settings.min_lr,
            warmup_t=settings.warmup_epochs * steps,
            warmup_lr_init=settings.warmup_lr,
            t_in_epochs=False,
        )
        self.epoch = self.step = 0
        self._checked = False

    def keep_images(self, chooses: str | None, quiet: bool) -> None:
        """Decode images that several epochs need once, up to ``settings.cache`` GiB. All processes must call this.

        Args:
            chooses: The split that is evaluated after each epoch, or None. It is kept as well as the training images.
            quiet: Whether to print nothing.
        """
        if self.settings.total_epochs - self.epoch < 2 or not self.settings.cache:
            return
        room = int(self.settings.cache * 2**30)
        for images in [self.images, *([getattr(self.splits, chooses)] if chooses else [])]:
            room -= loading.keep(images, self.world, self.settings.workers, room, quiet=quiet)

    def train_epoch(self, bar: tqdm[Any]) -> dict[str, float]:
        """Train on all training images once.

        Returns:
            Mean loss and accuracy over all processes (a mixed image counts as its larger share), the last
            learning rate, and images per second.

        Raises:
            FloatingPointError: If the loss becomes infinite or NaN.
            RuntimeError: If a trained parameter gets no gradient.
        """
        self.model.train()
        torch.manual_seed(keyed_seed("drop path", self.settings.seed, self.epoch, self.world.rank))
        self.batches.epoch = self.epoch
        start, seen, number, waited = time.perf_counter(), 0, 0, 0.0
        loaded = loading.batches(self.images, self.batches, self.device, self.settings.workers)
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
            # not at every step: reading a result waits for the GPU and for other processes
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
        """Add the gradient of one batch; returns the sum of losses and the number of hits of its images."""
        labels = labels.to(self.device, non_blocking=True)
        images, targets = self.mixing(images, labels, self.step, number)
        with distributed.synchronising(self.wrapped, batch.last):
            logits = logits_of(self.forward, images, self.settings.precision)[: batch.counts]
            targets = targets[: batch.counts]
            # mixing smooths its targets itself
            smoothing = 0.0 if self.mixing.on else self.settings.label_smoothing
            loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
            # the mean over the whole step's images: gradients are averaged over processes of unequal parts
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
        """Raise if a parameter got no gradient: a model that reads ``layer.weight`` itself bypasses u, v and f."""
        untouched = [name for name, p in self.parameters.items() if p.grad is None]
        if untouched:
            raise RuntimeError(
                f"{len(untouched)} trained parameters get no gradient, {untouched[0]} among them: "
                f"{type(self.model).__name__} does not call these layers as modules"
            )
        self._checked = True

    def evaluate(self, images: ImageSet) -> tuple[float, float]:
        """Return (mean cross-entropy, accuracy) over a split. All processes must call this."""
        result = evaluate(self.model, images, self.settings, self.device, self.world)
        return result.loss, result.accuracy

    def averaged(self) -> AbstractContextManager[None]:
        """Replace the model's values by their moving average, if there is one, inside the context."""
        return self.average.in_place() if self.average else nullcontext()

    def trained(self) -> dict[str, Tensor]:
        """Copy the trained parameters (of sharded ones, this process's part)."""
        return {name: distributed.local(p.detach()).clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Set the trained parameters to values that :meth:`trained` returned."""
        for name, value in values.items():
            distributed.local(self.parameters[name].detach()).copy_(value)

    def save(self, folder: Path, metadata: Mapping[str, str], class_names: Sequence[str] | None) -> None:
        """Write the trained parameters as an adapter, from the main process. All processes must call this."""
        # every process holds a part of sharded parameters
        if self.world.main or isinstance(self.model, FSDPModule):
            save_adapter(self.model, folder, metadata, class_names=class_names)

    def state(self, best: Mapping[str, Tensor] | None, record: dict[str, Any]) -> State:
        """Collect everything that :meth:`load` needs. All processes must call this.

        Args:
            best: What :meth:`trained` returned at the chosen epoch, or None if that is the last.
            record: JSON values to store with it.
        """
        parts = {"trained": self.trained(), "best": best or {}, "average": self.average.values if self.average else {}}
        tensors = {
            f"{part}/{name}": distributed.gather(value, self.parameters[name])
            for part, values in parts.items()
            for name, value in values.items()
        }
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                # moments are sharded as the parameter; the number of steps is a scalar
                tensors[f"optimizer/{name}/{key}"] = value if key == "step" else distributed.gather(value, parameter)
        return State({"epoch": self.epoch, "scaler": self.scaler.state_dict(), **record}, tensors)

    def load(self, state: State) -> dict[str, Tensor]:
        """Continue from a state.

        Returns:
            The ``best`` that :meth:`state` was given; if that was None, the trained parameters.

        Raises:
            ValueError: If the state is of another model. Nothing is changed then.
        """
        self._check(state)
        self.restore(self._local_parts(state.part("trained")))
        for name, parameter in self.parameters.items():
            if moments := state.part(f"optimizer/{name}"):
                # the fused optimiser keeps the number of steps on the parameter's device
                step = moments.pop("step").to(parameter.device if self.fused else "cpu")
                sharded = {key: distributed.scatter(value, parameter) for key, value in moments.items()}
                self.optimizer.state[parameter] = {"step": step, **sharded}
        if self.average:
            for name, value in self._local_parts(state.part("average")).items():
                self.average.values[name].copy_(value)
        if state.record["scaler"]:
            self.scaler.load_state_dict(state.record["scaler"])
        self.epoch = state.record["epoch"]
        self.step = self.epoch * self.batches.steps
        best = state.part("best")
        if not best:
            with self.averaged():
                return self.trained()
        return self._local_parts(best)

    def _local_parts(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: distributed.local(distributed.scatter(t, self.parameters[name])) for name, t in whole.items()}

    def _check(self, state: State) -> None:
        """Raise ``ValueError`` if :meth:`load` could not use all of a state."""
        own = {name: (tuple(p.shape), p.dtype) for name, p in self.parameters.items()}
        for part in ("trained", "best", "average"):
            found = {name: (tuple(t.shape), t.dtype) for name, t in state.part(part).items()}
            # there is no best before the first epoch, or if the last epoch counts
            optional = part == "best" or (part == "average" and self.average is None)
            if found != own and not (optional and not found):
                raise ValueError(
                    "resume: the state is of a model whose trained parameters have other names or shapes, or it is "
                    f"damaged: {part}"
                )
        moments = state.part("optimizer")
        # AdamW has no moments before its first step
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
