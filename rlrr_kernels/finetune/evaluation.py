"""Evaluating one model over a split, in one or several processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlrr_kernels.finetune import distributed
from rlrr_kernels.finetune.batches import Batches
from rlrr_kernels.finetune.data import ImageSet, loading
from rlrr_kernels.finetune.settings import Settings

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """Results over a split.

    Attributes:
        loss: Mean cross-entropy over all processes.
        accuracy: 0 to 1, over all processes.
        hits: Correct answers of this process for each class, int64 ``[classes]``.
        images: Images of this process in each class, int64 ``[classes]``.
    """

    loss: float
    accuracy: float
    hits: Tensor
    images: Tensor


def logits_of(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    """Float32 logits ``[batch, classes]`` of images ``[batch, C, H, W]``, computed in the given precision."""
    dtype = AUTOCAST[precision]
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return model(images).float()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    settings: Settings,
    device: torch.device,
    world: distributed.World,
    labels: Tensor | None = None,
) -> Evaluation:
    """Evaluate a model on a split, each image once in one of the processes.

    Args:
        model: On ``device``.
        images: The split.
        settings: Batch size, precision and workers.
        device: This process's device.
        world: This process.
        labels: The model's label of each label of ``images``, int64 ``[images.classes]``; None if they are equal.
    """
    model.eval()
    batches = Batches(len(images), settings.batch_size, world)
    loss = torch.zeros((), dtype=torch.float64)
    hits, count = torch.zeros(images.classes, dtype=torch.int64), torch.zeros(images.classes, dtype=torch.int64)
    loaded = loading.batches(images, batches, device, settings.workers)
    for batch, (inputs, classes) in zip(batches.plan(), loaded, strict=True):
        logits = logits_of(model, inputs, settings.precision)[: batch.counts].cpu()
        classes = classes[: batch.counts]
        targets = classes if labels is None else labels[classes]
        loss += F.cross_entropy(logits, targets, reduction="sum")
        hits += torch.bincount(classes[logits.argmax(1) == targets], minlength=images.classes)
        count += torch.bincount(classes, minlength=images.classes)
    loss_sum, right = distributed.total(world, loss, hits.sum(), device=device)
    return Evaluation(loss_sum / len(images), right / len(images), hits, count)
