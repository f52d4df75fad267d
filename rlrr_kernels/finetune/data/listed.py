"""Images that list files name: reading, and the checks that find a bad list or image before training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from rlrr_kernels.finetune.data.images import UNREADABLE, read_image
from rlrr_kernels.finetune.data.pixels import check_range

#: Lists of up to so many images have each image decoded beforehand (a JPEG of 224 pixels: 0.3 ms; of 500: 0.9 ms;
#: a PNG of 224: 1.4 ms). Of longer ones, such as the 73,728 test images of a VTAB-1k task, header and end are
#: looked at (0.05 ms).
DECODED_UP_TO = 6_000

#: Last bytes of a whole file, by Pillow's name of the format.
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB\x60\x82"}

#: Files looked at at once: most of the time goes to waiting for the disk, or into decoding without Python's lock.
THREADS = 8

#: What is wrong with a file that is not there.
MISSING = "does not exist"


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
        return read_image(path), label


def need_file(path: Path, what: str) -> None:
    """``FileNotFoundError`` unless ``path`` is a file. ``what`` says what it is for."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{what}: folder {path.parent} does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"{what}: {path} does not exist")


def check_images(entries: Sequence[Entry]) -> None:
    """Every image of the list can be read, and has values of a defined range.

    Up to :data:`DECODED_UP_TO` images are decoded in full, JPEGs at an eighth of their size, which finds the same
    faults. Of a longer list each file's header and end are looked at, and what does not end as its format does
    is decoded: bytes behind the end of a JPEG are common and do no harm, an end that is missing does.

    Raises:
        FileNotFoundError, OSError: the first file that fails, where it is listed, and how many more do.
    """
    decode = len(entries) <= DECODED_UP_TO
    # here and not in the threads: while one of them loads Pillow's formats, the others would find half of them
    Image.init()
    step = 64
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(
            lambda start: [_fault(entry.path, decode) for entry in entries[start : start + step]],
            range(0, len(entries), step),
        )
        faults = [fault for part in found for fault in part]
    bad = [i for i, fault in enumerate(faults) if fault]
    if bad:
        first, fault = entries[bad[0]], faults[bad[0]]
        more = f" (and {len(bad) - 1:,} more of {len(entries):,} images fail)" if len(bad) > 1 else ""
        kind = FileNotFoundError if fault == MISSING else OSError
        raise kind(f"{first.where}: image {first.path} {fault}{more}")


def _fault(path: str, decode: bool) -> str:
    """What is wrong with an image; empty where nothing is."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return "cannot be read: the file is empty"
            if not decode:
                with Image.open(file) as image:
                    check_range(image)
                    end = ENDS.get(image.format or "")
                if end:
                    file.seek(-len(end), os.SEEK_END)
                    if file.read() == end:
                        return ""
                file.seek(0)
            with Image.open(file) as image:
                check_range(image)
                image.draft("L", (1, 1))
                image.load()
    except FileNotFoundError:
        return MISSING
    except UNREADABLE as error:
        return f"cannot be read: {error}"
    return ""


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


def share_files(one: Iterable[Entry], other: Iterable[Entry]) -> bool:
    """Whether any file is in both lists."""
    return not {os.path.normpath(entry.path) for entry in one}.isdisjoint(os.path.normpath(e.path) for e in other)


def check_labels_together(source: Path, whole: Sequence[Entry], *parts: Sequence[Entry]) -> None:
    """``whole``, read from ``source``, has as many images of each label as ``parts`` together.

    What can be told of a list that names copies of their images.

    Raises:
        ValueError: another number of images, or of images of a label.
    """
    expected = Counter(entry.label for part in parts for entry in part)
    got = Counter(entry.label for entry in whole)
    if got.total() != expected.total():
        raise ValueError(
            f"{source}: expected {expected.total()} images, as the training and validation lists have together, "
            f"got {got.total()}"
        )
    for label in sorted(expected | got):
        if got[label] != expected[label]:
            raise ValueError(
                f"{source}: expected {expected[label]} images of label {label}, as the training and validation lists "
                f"have together, got {got[label]}"
            )
