"""Which dataset a run means, and its splits."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import ConcatDataset, Subset

from rlrr_kernels.finetune.data.arrays import (
    FASHION_MNIST_FOLDER,
    Arrays,
    read_digits,
    read_fashion_mnist_parts,
    read_npz,
)
from rlrr_kernels.finetune.data.fgvc import read_fgvc
from rlrr_kernels.finetune.data.folder import read_folder
from rlrr_kernels.finetune.data.images import ImageSet, Parts, Transform
from rlrr_kernels.finetune.data.listed import Listed
from rlrr_kernels.finetune.data.named import TIMM_PREFIXES, read_named
from rlrr_kernels.finetune.data.vtab import read_vtab
from rlrr_kernels.finetune.recipes import split_task


class DataSettings(Protocol):
    """The fields of :class:`~rlrr_kernels.finetune.settings.Settings` that say which images a run sees."""

    @property
    def task(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def data_root(self) -> Path | None: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Splits:
    """The parts of a dataset and its classes.

    Attributes:
        train: seen through the training transform.
        val, test: seen through the test transform.
        trainval: train and val together, seen through the training transform; of VTAB-1k what its own list names.
        class_names: of each label in order; the labels themselves where a source has no names.
        notes: what a user should know of what was found, a line each.
        drawn_from: of which images the seed drew those of val; empty where the dataset brings some.
        fingerprint: of names and labels, in the order of each split, see :func:`fingerprint`.
        named: whether the source has names for its classes, and not labels alone.
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
        """How many there are: labels are 0 to ``classes - 1``."""
        return len(self.class_names)

    @property
    def names(self) -> tuple[str, ...] | None:
        """``class_names``, or None where they are labels alone, which mean nothing beyond this source."""
        return self.class_names if self.named else None


def load_splits(settings: DataSettings, train_transform: Transform, test_transform: Transform) -> Splits:
    """Find, check and split the images of a run, before training.

    Lists and their labels are checked in full; image files as
    :func:`~rlrr_kernels.finetune.data.listed.check_images` says; of named datasets the labels that they have at hand.

    Args:
        settings: ``task`` (with ``data_root``) or else ``data``; the ``seed`` decides which images are set aside
            for validation where the dataset brings no such split, and what the transforms draw.
        train_transform, test_transform: PIL image -> tensor.

    Raises:
        FileNotFoundError: a folder, list, split or image that does not exist, with its path.
        OSError: an image that cannot be read, with its path.
        ValueError: an unknown name or task, a label out of range, or a list that is wrong, with file and line.
    """
    parts, seed = _read(settings), settings.seed
    trainval = parts.trainval if parts.trainval is not None else ConcatDataset([parts.train, parts.val])
    return Splits(
        ImageSet(parts.train, train_transform, parts.classes, seed),
        ImageSet(parts.val, test_transform, parts.classes, seed),
        ImageSet(parts.test, test_transform, parts.classes, seed),
        ImageSet(trainval, train_transform, parts.classes, seed),
        parts.class_names,
        parts.notes,
        parts.drawn_from,
        fingerprint(parts),
        parts.named,
    )


def describe(splits: Splits) -> list[str]:
    """How many images and classes were found, and the notes: lines for a user, before anything is trained."""
    counts = ", ".join(f"{name} {len(getattr(splits, name)):,}" for name in ("train", "val", "test"))
    classes = f"{splits.classes:,} class" + "es" * (splits.classes > 1)
    named = ", ".join(splits.class_names[:10]) + (", ..." if splits.classes > 10 else "")
    drawn = [f"note: the val images were set aside from {splits.drawn_from}"] if splits.drawn_from else []
    lines = [f"images: {counts}", f"{classes}: {named}", *drawn, *splits.notes]
    # names of files may hold what a terminal obeys or cannot print
    return [line if line.isprintable() else repr(line) for line in lines]


def fingerprint(parts: Parts) -> str:
    """What a run must find again to go on: the same names (below the folder that holds all of them), labels and
    order in each split, and the same classes; of images in memory the pixels too, of files not what is in them, and
    of named datasets only how many there are. Wherever all of that lies.
    """
    splits = [part for part in (parts.train, parts.val, parts.test, parts.trainval) if part is not None]
    listings = [listing(part) for part in splits]
    paths = [path for _, found in listings for path in found]
    root = len(os.path.commonpath(paths)) if paths else 0
    digest = hashlib.sha256(json.dumps(parts.class_names).encode())
    for part, (labels, found) in zip(splits, listings, strict=True):
        digest.update(json.dumps([len(part), labels, [path[root:] for path in found]]).encode())
        if isinstance(part, Arrays):
            digest.update(np.ascontiguousarray(part.images).data)
    return digest.hexdigest()


def listing(items: Any) -> tuple[list[int], list[str]]:
    """Labels (of a named dataset, positions) and paths (where there are files) of a split."""
    if isinstance(items, Subset):
        labels, paths = listing(items.dataset)
        return [labels[i] for i in items.indices], [paths[i] for i in items.indices if paths]
    if isinstance(items, Arrays):
        return items.labels.tolist(), []
    if isinstance(items, Listed):
        return [label for _, label in items.samples], [path for path, _ in items.samples]
    # what their labels are is not known without their images; where each stands in the dataset is
    return list(range(len(items))), []


def is_path(data: str) -> bool:
    """Whether ``data`` says where images lie, and not what they are called."""
    named = data in ("digits", "fashion-mnist") or data.startswith(TIMM_PREFIXES)
    return not named and (data.endswith(".npz") or Path(data).is_dir())


def _read(settings: DataSettings) -> Parts:
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
