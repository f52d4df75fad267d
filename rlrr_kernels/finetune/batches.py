"""Which images make which batch: by seed, epoch and step, never by what ran before or in how many processes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from rlrr_kernels.finetune.distributed import World


def keyed_seed(purpose: str, *key: int) -> int:
    """A seed of 32 bits for the draws of one purpose: equal keys give equal seeds, others unrelated ones."""
    return int(np.random.SeedSequence([zlib.crc32(purpose.encode()), *key]).generate_state(1, np.uint32)[0])


class Batch(NamedTuple):
    """One process's part of one batch.

    Attributes:
        indices: its images. Never empty: a process that has none takes one along, to keep step with the others.
        counts: how many of them count, 0 or all.
        step_images: images of the whole step, over all batches that it accumulates and all processes.
        last: whether the step ends with this batch.
    """

    indices: list[int]
    counts: int
    step_images: int
    last: bool


class Batches(Sampler[list[Any]]):
    """The batches of an epoch for one process, as a batch sampler.

    The images of a step are consecutive in the epoch's order; each batch of it is cut
    into one part a process. So two processes with batches of 16, or two accumulated
    batches of 16, see in each step what one process with batches of 32 sees. The last
    step takes what is left.

    Args:
        images: how many there are.
        batch_size: images a batch in each process.
        world: this process, and how many there are.
        accumulation: batches a step.
        seed: of the order, anew in each epoch; None: as they come, once.
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
        """The batches of the epoch ``self.epoch``, in order."""
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
            # an index with its epoch: random transforms draw by both
            yield batch.indices if self.seed is None else [(self.epoch, index) for index in batch.indices]
