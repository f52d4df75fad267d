"""Small runs on a few real digits, for the tests."""

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from torch.utils.data import ConcatDataset, Subset

from rlrr_kernels.finetune import Settings, loop, prepare
from rlrr_kernels.finetune.data import ImageSet, Splits
from rlrr_kernels.finetune.loop import Prepared


def shrink(splits: Splits, train: int = 96, val: int = 40, test: int = 50) -> Splits:
    """The first images of each split."""

    def first(images: ImageSet, count: int) -> ImageSet:
        return ImageSet(Subset(images.items, range(count)), images.transform, images.classes, images.seed)

    small = first(splits.train, train), first(splits.val, val), first(splits.test, test)
    both = ImageSet(ConcatDataset([s.items for s in small[:2]]), small[0].transform, splits.classes, splits.train.seed)
    return dataclasses.replace(splits, **dict(zip(("train", "val", "test", "trainval"), (*small, both), strict=True)))


def prepared(folder: Path, sizes: tuple[int, int, int] = (96, 40, 50), **changes: object) -> Prepared:
    """Prepare a run of two epochs into ``folder / "run"`` with these changes to its settings."""
    options = {"device": "cpu", "epochs": 2, "warmup_epochs": 1, "lr": 5e-3, "tensorboard": False, **changes}
    if "resume" not in options:
        options.setdefault("out", folder / "run")
    ready = prepare(Settings(**options))
    return dataclasses.replace(ready, splits=shrink(ready.splits, *sizes))


def first_is_best() -> AbstractContextManager[object]:
    """Make the first epoch the best one, whatever its results."""
    return mock.patch.object(loop, "_is_best", lambda metrics, split: len(metrics["epochs"]) == 1)


#: Entries that differ from run to run.
TIMES = ("images_per_second", "train_seconds", "started")


def results(metrics: dict) -> dict:
    """The part of ``metrics.json`` that a run with equal settings must repeat bit for bit."""
    kept = {k: v for k, v in metrics.items() if k not in (*TIMES, "run", "settings", "resumed_after", "command")}
    epochs = [{k: v for k, v in epoch.items() if k not in TIMES} for epoch in metrics["epochs"]]
    return kept | {"epochs": epochs}
