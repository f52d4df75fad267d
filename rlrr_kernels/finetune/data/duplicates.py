"""The same image twice: one file that is listed twice, and files of equal contents in two splits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from rlrr_kernels.finetune.data.listed import THREADS, Entry

#: Files of equal sizes are compared by so many bytes at their end, and those that agree there by all they have,
#: up to so many files and so many bytes in all.
END, COMPARED_FILES, COMPARED_BYTES = 4096, 100_000, 256 * 2**20


def check_distinct(*lists: Sequence[Entry]) -> None:
    """No file is listed twice, be it in one list or in two, by one name or through links.

    An image of the test list that is trained on makes the test figure worthless, and one that counts
    twice makes it another figure: both mean that a list is damaged.

    Raises:
        ValueError: the file, and the two places.
    """
    seen: dict[Hashable, Entry] = {}
    for entries in lists:
        for entry in entries:
            other = seen.setdefault(_identity(entry.path), entry)
            if other is not entry and _one_file(other.path, entry.path):
                name = "" if os.path.normpath(other.path) == os.path.normpath(entry.path) else f", as {other.path}"
                raise ValueError(f"{entry.where}: image {entry.path} is listed already, at {other.where}{name}")


def _identity(path: str) -> Hashable:
    """The same for all names of a file; of one that is not there, its name."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.normpath(path)
    return found.st_dev, found.st_ino


def _one_file(one: str, other: str) -> bool:
    """Whether two names of equal identity are one file's: some network disks number files twice."""
    return os.path.realpath(one) == os.path.realpath(other) or os.stat(one).st_nlink > 1


def equal_files(train: Iterable[Entry], test: Iterable[Entry], names: tuple[str, str]) -> list[str]:
    """A warning that counts the files of ``test`` that have the contents of one of ``train``, and names a pair.

    Only files of equal sizes are read, and they up to :data:`COMPARED_FILES` and :data:`COMPARED_BYTES`; beyond that
    the line says that they were not compared. Nothing to warn of is no line.

    Args:
        train, test: files that exist.
        names: of the two splits.
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
    """As :func:`equal_files`, of images ``[count, ...]`` in memory; one of other shape is no equal."""
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
