"""Datasets of torchvision and Hugging Face by name, through timm's factory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.transforms.functional import pil_to_tensor

from rlrr_kernels.finetune.data.images import ImageSet, Transform, read_image
from rlrr_kernels.finetune.data.parts import Parts, set_aside

#: Prefixes of timm's dataset factory that can be indexed.
TIMM_PREFIXES = ("torch/", "hfds/")


class Strict(Dataset[tuple[Image.Image, int]]):
    """A timm dataset that raises for an unreadable image; timm's own returns the next image instead."""

    def __init__(self, dataset: Any) -> None:
        self.reader = dataset.reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label, *_ = self.reader[index]
        with file:
            return read_image(file), -1 if label is None else label

    def filename(self, index: int, absolute: bool = False) -> Any:
        """Path of an image, as timm's datasets return it."""
        return self.reader.filename(index, absolute=absolute)


def read_named(name: str, root: Path | None, seed: int) -> Parts:
    """Read the splits ``train`` and ``test``; a fifth of each class in ``train`` is set aside by the seed.

    Labels that are available without the images are checked here, the others when they are read. The training labels
    are always needed here, and read with the images if necessary.

    Args:
        name: ``torch/cifar100``, ``hfds/<owner>/<name>``, ...
        root: Folder of the dataset. One process at a time downloads torchvision's datasets there.
        seed: Seed of the validation split.

    Raises:
        ValueError: If a torchvision dataset has no root, the dataset does not name its classes, or a label is out of
            range (``-1`` in a split that is published without labels).
    """
    if root is None and name.startswith("torch/"):
        raise ValueError(f"data_root: expected a folder to keep {name} in, got none")
    options = {"root": str(root) if root else None, "download": name.startswith("torch/")}
    with _locked(root) if root and options["download"] else nullcontext():
        seen, test = (create_dataset(name, split=split, **options) for split in ("train", "test"))
    names = getattr(seen, "classes", None) or getattr(getattr(seen, "reader", None), "class_to_idx", None)
    if isinstance(names, Mapping):
        names = sorted(names, key=names.__getitem__)
    if not names:
        raise ValueError(f"data: {name!r} does not say how many classes it has")
    labels, _ = (
        _check_labels(images, len(names), f"data: {name!r}, split {split}")
        for split, images in (("train", seen), ("test", test))
    )
    for images in (seen, test):
        if isinstance(images, DatasetFolder):
            # torchvision's own loader clips 16-bit values at 255
            images.loader = read_image
    seen, test = (Strict(images) if hasattr(images, "reader") else images for images in (seen, test))
    if not labels:
        read = ImageSet(seen, Transform(pil_to_tensor), len(names))
        labels = [read.image(i)[1] for i in range(len(read))]
    kept, aside = set_aside(labels, seed)
    return Parts(
        Subset(seen, kept), Subset(seen, aside), test, tuple(map(_class_name, names)), drawn_from="its split train"
    )


def _class_name(name: Any) -> str:
    """Join the names of a class that has several, as in ImageNet."""
    return ", ".join(name) if isinstance(name, tuple) else str(name)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Lock ``root``, so that the first of several processes downloads and the others find the files.

    Unlike a barrier of the process group, a lock on the folder does not time out during a long download, and works
    if each machine has its own root. A read-only root is not locked: nothing can be downloaded there.
    """
    root.mkdir(parents=True, exist_ok=True)
    if not os.access(root, os.W_OK):
        yield
        return
    # writable by everyone, as users may share the root
    with FileLock(root / ".download.lock", mode=0o666):
        yield


def _check_labels(images: Any, classes: int, what: str) -> list[int]:
    """Return and check the labels that are available without reading images; empty if there are none.

    Those are a column of a Hugging Face dataset, or ``targets`` of most torchvision datasets.

    Raises:
        ValueError: If a label is not in 0 to ``classes - 1``, or there is no column of labels.
    """
    reader = getattr(images, "reader", None)
    key, columns = getattr(reader, "label_key", None), getattr(getattr(reader, "dataset", None), "column_names", None)
    if key and columns is not None:
        if key not in columns:
            raise ValueError(f"{what}: expected a column {key!r}, got {', '.join(columns)}")
        labels = reader.dataset[key][:]  # type: ignore[union-attr]
    else:
        labels = getattr(images, "targets", [])
    labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    wrong = [i for i, label in enumerate(labels) if not (isinstance(label, int) and 0 <= label < classes)]
    if wrong:
        more = f" (and {len(wrong) - 1:,} more of {len(labels):,} labels are not)" if len(wrong) > 1 else ""
        raise ValueError(f"{what}: image {wrong[0]} has label {labels[wrong[0]]}, expected 0 to {classes - 1}{more}")
    return labels
