"""What all readers of datasets share: the parts of a dataset, lists of image files, and checks before training."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from rlrr_kernels.finetune.data.images import UNREADABLE, check_range, read_image

#: Share of the training images that is set aside for validation if a dataset has no such split.
VALIDATION_SHARE = 0.2

#: Images of lists up to this length are decoded beforehand (0.3 ms for a JPEG of 224 pixels, 1.4 ms for a PNG). Longer
#: lists, such as the 73,728 test images of a VTAB-1k task, have only headers and ends checked (0.05 ms).
DECODED_UP_TO = 6_000

#: Last bytes of a complete file, by Pillow's name of the format.
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB\x60\x82"}

#: Files read in parallel: most of the time is waiting for the disk, or decoding without Python's lock.
THREADS = 8

#: The fault of a missing file.
MISSING = "does not exist"

#: Files of equal size are compared by this many bytes at their end, and if those are equal by their whole contents, up
#: to this many files and bytes in all.
END, COMPARED_FILES, COMPARED_BYTES = 4096, 100_000, 256 * 2**20


class Parts(NamedTuple):
    """A dataset as its reader returns it: indexed datasets of (PIL image, label).

    Attributes:
        train: Training images.
        val: Validation images.
        test: Test images.
        class_names: Names in the order of the labels; the labels themselves if the source has no names.
        trainval: Training and validation images if the dataset lists them separately; None: the two joined.
        notes: Lines for the user about what was found.
        drawn_from: The images from which ``val`` was drawn by the seed; empty if the dataset has such a split.
        named: Whether the source names its classes.
    """

    train: Any
    val: Any
    test: Any
    class_names: tuple[str, ...]
    trainval: Any = None
    notes: tuple[str, ...] = ()
    drawn_from: str = ""
    named: bool = True


def numbered(classes: int) -> tuple[str, ...]:
    """Use labels as the names of classes without names."""
    return tuple(map(str, range(classes)))


def set_aside(labels: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Draw the images to validate on.

    Each class is split as nearly in proportion as whole images allow. Classes of one image are not drawn from.

    Args:
        labels: Labels of all images.
        seed: Seed of the draw.

    Returns:
        Indices of the images to train on, and of those to validate on.

    Raises:
        ValueError: If no class has two images.
    """
    counts = Counter(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    # the order of the classes is random too: it decides which of the small classes give an image
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
    # equal steps through the sorted classes: each gives its share to within one image
    count = max(1, round(len(pool) * VALIDATION_SHARE))
    chosen = {pool[(2 * i + 1) * len(pool) // (2 * count)] for i in range(count)}
    return [i for i in order if i not in chosen], sorted(chosen)


class Entry(NamedTuple):
    """One image of a list: its file, its label, and where it is listed (``file:line``)."""

    path: str
    label: int
    where: str


class Listed(Dataset[tuple[Image.Image, int]]):
    """PIL images from files, decoded when needed."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.samples = [(entry.path, entry.label) for entry in entries]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        return read_image(path), label


def check_exists(path: Path, purpose: str) -> None:
    """Raise ``FileNotFoundError``, whose message starts with ``purpose``, if ``path`` is not a file."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{purpose}: folder {path.parent} does not exist")
    if not path.is_file():
        raise FileNotFoundError(f"{purpose}: {path} does not exist")


def check_images(entries: Sequence[Entry]) -> None:
    """Check that every image of a list can be read, and that its values have a defined range.

    Up to :data:`DECODED_UP_TO` images are decoded, JPEGs at an eighth of their size, which finds the same faults.
    In a longer list only headers and ends are checked, and files without the format's end are decoded: bytes after
    the end of a JPEG are common and harmless, a missing end is not.

    Raises:
        FileNotFoundError, OSError: If an image fails. The message names the first one and counts the others.
    """
    decode = len(entries) <= DECODED_UP_TO
    # not in the threads: Pillow loads its formats once, and a second thread would find only some of them
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
    """Describe what is wrong with an image; empty if nothing is."""
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


def share_files(one: Iterable[Entry], other: Iterable[Entry]) -> bool:
    """Whether any file is in both lists."""
    return not {os.path.normpath(entry.path) for entry in one}.isdisjoint(os.path.normpath(e.path) for e in other)


def check_union(source: Path, whole: Sequence[Entry], *parts: Sequence[Entry]) -> None:
    """Check that ``whole``, read from ``source``, lists exactly the files of ``parts``, with the same labels.

    Raises:
        ValueError: If an image is missing on one side, or has two labels.
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


def check_label_counts(source: Path, whole: Sequence[Entry], *parts: Sequence[Entry]) -> None:
    """Check that ``whole``, read from ``source``, has as many images of each label as ``parts``, if it lists copies.

    Raises:
        ValueError: If a number differs.
    """
    expected = Counter(entry.label for part in parts for entry in part)
    got = Counter(entry.label for entry in whole)
    where = "the training and validation lists"
    if got.total() != expected.total():
        raise ValueError(f"{source}: expected {expected.total()} images, as {where} have together, got {got.total()}")
    for label in sorted(expected | got):
        if got[label] != expected[label]:
            raise ValueError(
                f"{source}: expected {expected[label]} images of label {label}, as {where} have together, "
                f"got {got[label]}"
            )


def check_distinct(*lists: Sequence[Entry]) -> None:
    """Check that no file is listed twice, in one list or in two, by one name or through links.

    A test image that is also trained on makes the test result worthless, and a repeated image changes it.

    Raises:
        ValueError: If a file is listed twice. The message has both places.
    """
    seen: dict[Hashable, Entry] = {}
    for entries in lists:
        for entry in entries:
            other = seen.setdefault(_identity(entry.path), entry)
            if other is not entry and _same_file(other.path, entry.path):
                name = "" if os.path.normpath(other.path) == os.path.normpath(entry.path) else f", as {other.path}"
                raise ValueError(f"{entry.where}: image {entry.path} is listed already, at {other.where}{name}")


def _identity(path: str) -> Hashable:
    """The same for all names of a file; the name itself if the file is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.normpath(path)
    return found.st_dev, found.st_ino


def _same_file(one: str, other: str) -> bool:
    """Whether two names of equal identity are one file: some network disks give two files one number."""
    return os.path.realpath(one) == os.path.realpath(other) or os.stat(one).st_nlink > 1


def equal_files(train: Iterable[Entry], test: Iterable[Entry], names: tuple[str, str]) -> list[str]:
    """Find files of ``test`` with the contents of a file of ``train``.

    Only files of equal size are read, up to :data:`COMPARED_FILES` and :data:`COMPARED_BYTES`.

    Args:
        train: Images that exist.
        test: Images that exist.
        names: Names of the two splits.

    Returns:
        A warning that counts the files and names a pair, a note that there were too many to compare, or nothing.
    """
    sides = [{entry.path: os.path.getsize(entry.path) for entry in entries} for entries in (train, test)]
    common = set[Hashable](sides[0].values()) & set(sides[1].values())
    keys: list[dict[str, Hashable]] = [{p: size for p, size in side.items() if size in common} for side in sides]
    for digest in (_end, _whole):
        most = END if digest is _end else COMPARED_BYTES
        sizes = [min(most, side[path]) for side, kept in zip(sides, keys, strict=True) for path in kept]
        if len(sizes) > COMPARED_FILES or sum(sizes) > COMPARED_BYTES:
            return [
                f"note: {names[0]} and {names[1]} were not searched for equal images, as {len(sizes):,} files "
                "would have to be read"
            ]
        with ThreadPoolExecutor(THREADS) as pool:
            keys = [dict(zip(kept, pool.map(digest, kept), strict=True)) for kept in keys]
        common = set(keys[0].values()) & set(keys[1].values())
        keys = [{p: key for p, key in kept.items() if key in common} for kept in keys]
    if not keys[1]:
        return []
    twin = {key: path for path, key in reversed(keys[0].items())}
    path, key = next(iter(keys[1].items()))
    return [_warning(len(keys[1]), len(sides[1]), names, path, twin[key])]


def _end(path: str) -> Hashable:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - END))
        return size, file.read()


def _whole(path: str) -> Hashable:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def equal_arrays(train: np.ndarray, test: np.ndarray, names: tuple[str, str]) -> list[str]:
    """Find equal images as :func:`equal_files` does, in arrays ``[count, ...]``."""
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        return []
    first: dict[bytes, int] = {}
    for index, image in enumerate(train):
        first.setdefault(hashlib.sha256(image.tobytes()).digest(), index)
    digests = (hashlib.sha256(image.tobytes()).digest() for image in test)
    pairs = [(i, first[digest]) for i, digest in enumerate(digests) if digest in first]
    if not pairs:
        return []
    one, other = pairs[0]
    return [_warning(len(pairs), len(test), names, f"{names[1]} image {one}", f"{names[0]} image {other}")]


def _warning(count: int, of: int, names: tuple[str, str], one: str, other: str) -> str:
    equal = "is the same as one" if count == 1 else "are the same as some"
    return f"warning: {count:,} of {of:,} {names[1]} images {equal} of {names[0]}: {one} and {other}"
