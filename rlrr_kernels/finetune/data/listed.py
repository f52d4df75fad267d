"""Images that list files name: reading, and the checks that find a bad list or image before training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from rlrr_kernels.finetune.data.images import UNREADABLE

#: Lists of up to so many images have each image's header read beforehand (about 0.1 ms an image); of longer
#: ones, such as the 73,728 test images of a VTAB-1k task, only existence and size are looked at.
HEADERS_UP_TO = 6_000

#: Share of the training images set aside where a dataset brings no validation split.
VALIDATION_SHARE = 0.2


class Entry(NamedTuple):
    """One image of a list: its file, its label, and where the list says so (``file:line``)."""

    path: str
    label: int
    where: str


class Listed(Dataset[tuple[Image.Image, int]]):
    """PIL images from files, decoded when they are asked for."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.samples = [(entry.path, entry.label) for entry in entries]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with Image.open(path) as image:
            # decode here, where a truncated file can still be told by its path
            image.load()
            return image, label


def need_file(path: Path, what: str) -> None:
    """``FileNotFoundError`` unless ``path`` is a file. ``what`` says what it is for."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{what}: folder {path.parent} does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path} does not exist")


def check_images(entries: Sequence[Entry]) -> None:
    """Every file exists and is not empty; of short lists also every header is read.

    Raises:
        FileNotFoundError, OSError: the first file that fails, where it is listed, and how many more do.
    """

    def present(entry: Entry) -> None:
        if os.path.getsize(entry.path) == 0:
            raise OSError("the file is empty")
        if len(entries) <= HEADERS_UP_TO:
            with Image.open(entry.path) as image:
                image.verify()

    first, why, count = None, "", 0
    for entry in entries:
        try:
            present(entry)
        except FileNotFoundError:
            reason = "does not exist"
        except UNREADABLE as error:
            reason = f"cannot be read: {error}"
        else:
            continue
        count += 1
        if first is None:
            first, why = entry, reason
    if first is not None:
        more = f" (and {count - 1:,} more of {len(entries):,} images fail)" if count > 1 else ""
        kind = FileNotFoundError if why == "does not exist" else OSError
        raise kind(f"{first.where}: image {first.path} {why}{more}")


def check_distinct(*lists: Sequence[Entry]) -> None:
    """No file is listed twice, be it in one list or in two.

    An image of the test list that is trained on makes the test figure worthless, and one that counts
    twice makes it another figure: both mean that a list is damaged.

    Raises:
        ValueError: the file, and the two places.
    """
    seen: dict[str, Entry] = {}
    for entries in lists:
        for entry in entries:
            other = seen.setdefault(os.path.normpath(entry.path), entry)
            if other is not entry:
                raise ValueError(f"{entry.where}: image {entry.path} is listed already, at {other.where}")


def check_together(source: Path, whole: Sequence[Entry], *parts: Sequence[Entry]) -> None:
    """``whole``, read from ``source``, lists what ``parts`` list together, with the same labels.

    Raises:
        ValueError: an image that only one side has, or that has two labels.
    """
    listed = {os.path.normpath(entry.path): entry for entry in whole}
    for entry in (entry for part in parts for entry in part):
        other = listed.pop(os.path.normpath(entry.path), None)
        if other is None:
            raise ValueError(f"{entry.where}: image {entry.path} is not in {source}, which must list it too")
        if other.label != entry.label:
            raise ValueError(
                f"{entry.where}: image {entry.path} has label {entry.label} here, but {other.label} at {other.where}"
            )
    for entry in listed.values():
        raise ValueError(f"{entry.where}: image {entry.path} is in neither the training nor the validation list")


def set_aside(count: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of ``count`` images to train on and to validate on, drawn by the seed.

    Raises:
        ValueError: fewer than two images.
    """
    order = _shuffled(count, seed)
    aside = max(1, round(count * VALIDATION_SHARE))
    return order[aside:], order[:aside]


def set_aside_stratified(labels: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """As :func:`set_aside`, with each class in both parts as nearly in proportion as whole images allow."""
    order = _shuffled(len(labels), seed)
    # classes in an order that the seed decides too: of classes with one image each, it then chooses which lose it
    rank: dict[int, int] = {}
    for index in order:
        rank.setdefault(labels[index], len(rank))
    order.sort(key=lambda index: rank[labels[index]])
    # equal steps through the classes: what each of them gives differs from its share by less than one image
    aside = max(1, round(len(labels) * VALIDATION_SHARE))
    chosen = {order[(2 * i + 1) * len(labels) // (2 * aside)] for i in range(aside)}
    return [i for i in order if i not in chosen], sorted(chosen)


def _shuffled(count: int, seed: int) -> list[int]:
    if count < 2:
        raise ValueError(f"data: expected at least 2 training images, to train on and to validate on, got {count}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
