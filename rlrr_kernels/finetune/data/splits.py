"""The dataset that a run's settings name, and its splits."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from rlrr_kernels.finetune.data.arrays import (
    FASHION_MNIST_FOLDER,
    Arrays,
    read_digits,
    read_fashion_mnist_parts,
    read_npz,
)
from rlrr_kernels.finetune.data.folder import read_folder
from rlrr_kernels.finetune.data.images import ImageSet, Transform
from rlrr_kernels.finetune.data.named import TIMM_PREFIXES, read_named
from rlrr_kernels.finetune.data.parts import Listed, Parts
from rlrr_kernels.finetune.data.tasks import read_fgvc, read_vtab
from rlrr_kernels.finetune.recipes import split_task
from rlrr_kernels.finetune.settings import Settings


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset and its classes.

    Attributes:
        train: Training images, seen through the training transform.
        val: Validation images, seen through the test transform.
        test: Test images, seen through the test transform.
        trainval: Training and validation images, seen through the training transform.
        class_names, notes, drawn_from, named: As in :class:`~rlrr_kernels.finetune.data.parts.Parts`.
        fingerprint: Hash of names, labels and order, see :func:`fingerprint`.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    trainval: ImageSet
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    drawn_from: str = ""
    fingerprint: str = ""
    named: bool = True

    @property
    def classes(self) -> int:
        """Number of classes: labels are 0 to ``classes - 1``."""
        return len(self.class_names)

    @property
    def names(self) -> tuple[str, ...] | None:
        """``class_names``, or None if they are only labels, which mean nothing outside of this dataset."""
        return self.class_names if self.named else None


def load_splits(settings: Settings, train_transform: Transform, test_transform: Transform) -> Splits:
    """Find, check and split the images of a run, before training.

    Lists and labels are checked in full, image files as :func:`~rlrr_kernels.finetune.data.parts.check_images` does;
    for named datasets only labels that are available without the images.

    Args:
        settings: ``task`` or ``data``, and ``data_root``, name the dataset; ``seed`` decides the validation images
            of a dataset without such a split, and the transforms' random draws.
        train_transform: Transform of training images.
        test_transform: Transform of the other images.

    Raises:
        FileNotFoundError: If a folder, list, split or image does not exist.
        OSError: If an image cannot be read.
        ValueError: If a name or task is unknown, a label is out of range, or a list is invalid.
    """
    parts, seed = _read(settings), settings.seed
    classes = len(parts.class_names)
    trainval = parts.trainval if parts.trainval is not None else ConcatDataset([parts.train, parts.val])
    return Splits(
        ImageSet(parts.train, train_transform, classes, seed),
        ImageSet(parts.val, test_transform, classes, seed),
        ImageSet(parts.test, test_transform, classes, seed),
        ImageSet(trainval, train_transform, classes, seed),
        parts.class_names,
        parts.notes,
        parts.drawn_from,
        fingerprint(parts),
        parts.named,
    )


def _read(settings: Settings) -> Parts:
    data, root, seed = settings.data, settings.data_root, settings.seed
    if settings.task:
        suite, name = split_task(settings.task)
        if root is None:
            raise ValueError(f"data_root: expected the folder that holds the images of {settings.task}, got none")
        return read_vtab(root, name) if suite == "vtab" else read_fgvc(root, name, seed)
    if data == "digits":
        return read_digits(seed)
    if data == "fashion-mnist":
        return read_fashion_mnist_parts(root or FASHION_MNIST_FOLDER, seed)
    if data.startswith(TIMM_PREFIXES):
        return read_named(data, root, seed)
    if Path(data).is_dir():
        return read_folder(Path(data), seed)
    if data.endswith(".npz"):
        return read_npz(Path(data), seed)
    if os.path.isabs(data):
        raise FileNotFoundError(f"data: {data} does not exist")
    raise ValueError(
        f"data: expected digits, fashion-mnist, a name starting with {', '.join(TIMM_PREFIXES)}, "
        f"an existing folder, or an .npz file, got {data!r}"
    )


def is_path(data: str) -> bool:
    """Whether the setting ``data`` is a path rather than a name."""
    named = data in ("digits", "fashion-mnist") or data.startswith(TIMM_PREFIXES)
    return not named and (data.endswith(".npz") or Path(data).is_dir())


def describe(splits: Splits) -> list[str]:
    """Lines for the user, before training: numbers of images and classes, and the notes."""
    counts = ", ".join(f"{name} {len(getattr(splits, name)):,}" for name in ("train", "val", "test"))
    classes = f"{splits.classes:,} class" + "es" * (splits.classes > 1)
    named = ", ".join(splits.class_names[:10]) + (", ..." if splits.classes > 10 else "")
    drawn = [f"note: the val images were set aside from {splits.drawn_from}"] if splits.drawn_from else []
    lines = [f"images: {counts}", f"{classes}: {named}", *drawn, *splits.notes]
    # file names may contain control characters
    return [line if line.isprintable() else repr(line) for line in lines]


def fingerprint(parts: Parts) -> str:
    """Hash what a resumed run must find again: class names, and the names, labels and order of each split's images.

    File names count from the common folder of all files, so that the data may be moved. Pixels are part of the hash
    for images in memory, but not for files. For named datasets only the number of images counts.
    """
    splits = [part for part in (parts.train, parts.val, parts.test, parts.trainval) if part is not None]
    listings = [_labels_and_paths(part) for part in splits]
    paths = [path for _, found in listings for path in found]
    root = len(os.path.commonpath(paths)) if paths else 0
    digest = hashlib.sha256(json.dumps(parts.class_names).encode())
    for part, (labels, found) in zip(splits, listings, strict=True):
        digest.update(json.dumps([len(part), labels, [path[root:] for path in found]]).encode())
        if isinstance(part, Arrays):
            digest.update(np.ascontiguousarray(part.images).data)
    return digest.hexdigest()


def _labels_and_paths(items: Any) -> tuple[list[int], list[str]]:
    """Labels and (if there are files) paths of a split. Positions replace the labels of a named dataset."""
    if isinstance(items, Subset):
        labels, paths = _labels_and_paths(items.dataset)
        return [labels[i] for i in items.indices], [paths[i] for i in items.indices if paths]
    if isinstance(items, Arrays):
        return items.labels.tolist(), []
    if isinstance(items, Listed):
        return [label for _, label in items.samples], [path for path, _ in items.samples]
    return list(range(len(items))), []
