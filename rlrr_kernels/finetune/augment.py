"""What happens to a batch of training images before the model sees it: mixup, cutmix, smoothed labels."""

from __future__ import annotations

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor

from rlrr_kernels.finetune.batches import keyed_seed
from rlrr_kernels.finetune.settings import Settings


class Mixing:
    """timm's mixup and cutmix with draws that depend on the seed and the step alone.

    So a resumed run mixes what the uninterrupted one would have mixed, and all
    processes mix by the same share. Label smoothing is part of it; without mixup and
    cutmix the loss does the smoothing.
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
            images: ``[batch, C, H, W]``, left as they are.
            labels: int64 ``[batch]``.
            step: numbers of the step and of the batch in it.

        Returns:
            Images of the same shape, and float32 ``[batch, classes]`` with rows that sum to 1.
            As given, where neither mixup nor cutmix is on.
        """
        if not self.on:
            return images, labels
        # timm wants an even number. One more image at the end, the first once more, leaves that one
        # mixed with itself and pairs all others
        count = len(images)
        odd = count % 2
        mixed = torch.cat([images, images[:1]]) if odd else images.clone()
        twice = torch.cat([labels, labels[:1]]) if odd else labels
        # timm draws from NumPy's global state, which is not ours to move
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(keyed_seed("mixing", self.seed, *step))  # noqa: NPY002
        try:
            mixed, targets = self.mixup(mixed, twice)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return mixed[:count], targets[:count]
