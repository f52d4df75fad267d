"""The training batches of each step, and how they are mixed: a function of seed, epoch and step alone.

So a resumed run, and any number of processes, see the same images in the same order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils.data import Sampler

from rlrr_kernels.finetune.distributed import World
from rlrr_kernels.finetune.settings import Settings


def keyed_seed(purpose: str, *key: int) -> int:
    """A 32-bit seed for the random draws of one purpose; different keys give unrelated seeds."""
    return int(np.random.SeedSequence([zlib.crc32(purpose.encode()), *key]).generate_state(1, np.uint32)[0])


class Batch(NamedTuple):
    """One process's part of one batch.

    Attributes:
        indices: Its images. Never empty: a process without images gets one to stay in step with the others.
        counts: How many of them count: 0 or all.
        step_images: Images of the whole step, over all accumulated batches and all processes.
        last: Whether this batch ends the step.
    """

    indices: list[int]
    counts: int
    step_images: int
    last: bool


class Batches(Sampler[list[Any]]):
    """The batches of an epoch for one process, as a batch sampler.

    The images of a step are consecutive in the epoch's order, and each of its batches is split among the processes.
    So two processes with batches of 16, or two accumulated batches of 16, see in each step what one process with
    batches of 32 sees. The last step takes the remaining images.

    Args:
        images: Number of images.
        batch_size: Images a batch in each process.
        world: This process.
        accumulation: Batches a step.
        seed: Seed of the order, which is new in each epoch; None keeps the order of the dataset.
    """

    def __init__(
        self, images: int, batch_size: int, world: World, *, accumulation: int = 1, seed: int | None = None
    ) -> None:
        if images < 1:
            raise ValueError(f"images: expected at least 1, got {images}")
        self.images, self.world, self.seed, self.epoch = images, world, seed, 0
        self.batch = batch_size * world.size
        self.step = self.batch * accumulation

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        return -(-self.images // self.step)

    def plan(self) -> list[Batch]:
        """The batches of epoch ``self.epoch``, in order."""
        if self.seed is None:
            order = list(range(self.images))
        else:
            generator = torch.Generator().manual_seed(keyed_seed("order", self.seed, self.epoch))
            order = torch.randperm(self.images, generator=generator).tolist()
        plan = []
        for start in range(0, self.images, self.step):
            step = order[start : start + self.step]
            for offset in range(0, len(step), self.batch):
                batch = step[offset : offset + self.batch]
                first, end = (len(batch) * rank // self.world.size for rank in (self.world.rank, self.world.rank + 1))
                last = offset + self.batch >= len(step)
                plan.append(Batch(batch[first:end] or batch[:1], end - first, len(step), last))
        return plan

    def __len__(self) -> int:
        whole, rest = divmod(self.images, self.step)
        return whole * (self.step // self.batch) + -(-rest // self.batch)

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.plan():
            # random transforms are seeded by epoch and index
            yield batch.indices if self.seed is None else [(self.epoch, index) for index in batch.indices]


class Mixing:
    """timm's mixup and cutmix, seeded by the run's seed and the step alone.

    Label smoothing is part of it; without mixup and cutmix the loss smooths the labels instead.
    """

    def __init__(self, settings: Settings, classes: int) -> None:
        self.seed = settings.seed
        self.on = bool(settings.mixup or settings.cutmix)
        self.mixup = Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing,
            num_classes=classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, *step: int) -> tuple[Tensor, Tensor]:
        """Mix a batch with itself in reverse order.

        Args:
            images: ``[batch, C, H, W]``; not modified.
            labels: int64 ``[batch]``.
            step: Numbers of the step and of the batch in it.

        Returns:
            Images of the same shape, and float32 targets ``[batch, classes]`` with rows that sum to 1; the arguments
            themselves if neither mixup nor cutmix is on.
        """
        if not self.on:
            return images, labels
        # timm needs an even number: the first image is appended again, so that one image is mixed with itself
        count = len(images)
        odd = count % 2
        mixed = torch.cat([images, images[:1]]) if odd else images.clone()
        labels = torch.cat([labels, labels[:1]]) if odd else labels
        # timm draws from NumPy's global generator
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(keyed_seed("mixing", self.seed, *step))  # noqa: NPY002
        try:
            mixed, targets = self.mixup(mixed, labels)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return mixed[:count], targets[:count]
