"""Which dataset a run means, and its splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.utils.data import ConcatDataset

from rlrr_kernels.finetune.data.arrays import (
    FASHION_MNIST_FOLDER,
    read_digits,
    read_fashion_mnist_parts,
    read_npz,
)
from rlrr_kernels.finetune.data.fgvc import read_fgvc
from rlrr_kernels.finetune.data.folder import read_folder
from rlrr_kernels.finetune.data.images import ImageSet, Parts, Transform
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
        named: whether the source has names for its classes, and not labels alone.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet
    trainval: ImageSet
    class_names: tuple[str, ...]
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
        parts.named,
    )


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
    raise ValueError(
        f"data: expected digits, fashion-mnist, a name starting with {', '.join(TIMM_PREFIXES)}, "
        f"an existing folder, or an .npz file, got {data!r}"
    )
