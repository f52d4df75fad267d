"""The images set aside to validate on, where a dataset brings no such split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

#: Share of the training images that are set aside.
VALIDATION_SHARE = 0.2


def set_aside(labels: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Indices of the images to train on and of those to validate on, drawn by the seed.

    Each class is in both as nearly in proportion as whole images allow, and keeps at least one to train on: classes
    of one image are not drawn from.

    Args:
        labels: of all images.
        seed: the same one draws the same images.

    Raises:
        ValueError: no class has two images.
    """
    counts = Counter(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    # classes in an order that the seed decides too: of classes that give one image or none, it then chooses which
    rank: dict[int, int] = {}
    for index in order:
        rank.setdefault(labels[index], len(rank))
    order.sort(key=lambda index: rank[labels[index]])
    pool = [index for index in order if counts[labels[index]] > 1]
    if not pool:
        raise ValueError(
            "data: expected a class of at least 2 training images, one of them to validate on, or a validation split; "
            f"got {len(labels)} images of {len(counts)} classes"
        )
    # equal steps through the classes: what each of them gives differs from its share by less than one image
    count = max(1, round(len(pool) * VALIDATION_SHARE))
    chosen = {pool[(2 * i + 1) * len(pool) // (2 * count)] for i in range(count)}
    return [i for i in order if i not in chosen], sorted(chosen)
