"""Files and folders that appear whole: a reader, or a crash, meets the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file, or replace it, so that nobody meets a part of it.

    Raises:
        OSError: it cannot be written. The old file is then as it was, and nothing else is left.
    """
    path = Path(path)
    temporary = _temporary(path)
    with _naming(path):
        try:
            _write(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            # whatever stands in the way of this must not hide what went wrong first
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder (or into an empty one) so that it appears with all its files at once.

    Raises:
        FileExistsError: the folder exists and is not empty.
        OSError: it cannot be written. Nothing is left behind then.
    """
    with _naming(folder):
        temporary = _filled(folder, files)
        try:
            if _has_content(folder):
                raise FileExistsError(f"{folder} exists")
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(folder.parent)


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a new folder in an old one's place. The old one is deleted after the new one stands there.

    Between two renames neither is under the name; both are then whole beside it.

    Raises:
        OSError: it cannot be written. The old folder is then as it was.
    """
    with _naming(folder):
        temporary = _filled(folder, files)
        old = _temporary(folder)
        try:
            os.rename(folder, old)
            try:
                os.rename(temporary, folder)
            except BaseException:
                os.rename(old, folder)
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)  # what is left of it has a temporary's name


def check_writable(folder: Path, needed: int = 0) -> None:
    """See that files of so many bytes can be put into a folder, or made below the nearest one that is there.

    What only fails at the end of hours of work should fail before it. A byte is written and removed again: permission
    bits say nothing to root, and nothing of a file system that is read-only, full or over a quota.

    Args:
        folder: where files will go; need not exist.
        needed: bytes.

    Raises:
        OSError: they cannot; says why, or how much is free.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file; expected a folder to write to")
    probe = _temporary(place / "probe")
    with _naming(place):
        try:
            _write(probe, b"?")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(probe)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{place} has {in_units(free)} free, expected {in_units(needed)}")


def in_units(size: int) -> str:
    """A number of bytes for a reader, rounded up."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{-(-10 * size // unit) / 10:g} {name}"
    return f"{size} bytes"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The system's errors name a temporary file, or none at all: a full disk has no name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def is_temporary(name: str, of: str) -> bool:
    """Whether a file's name is one that :func:`write_atomically` writes ``of`` under, left by a crash."""
    return name.startswith(f".{of}.") and name.endswith(".partial")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


def _filled(folder: Path, files: Mapping[str, bytes]) -> Path:
    temporary = _temporary(folder)
    temporary.mkdir()
    try:
        for name, data in files.items():
            _write(temporary / name, data)
        _sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return temporary


def _has_content(folder: Path) -> bool:
    return os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))


def _write(path: Path, data: bytes) -> None:
    # "x": the name is new, so a link that somebody put there is not followed
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
