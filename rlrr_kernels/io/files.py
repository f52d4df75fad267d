"""Atomic writes of files and folders: a reader, or a process that crashes, finds the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write or replace a file in one step.

    Raises:
        OSError: If it cannot be written. The old file is then unchanged, and no temporary file is left.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    with _name_in_errors(path):
        try:
            _write(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            # an error of this must not hide the first one
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder, or fill an empty one, with all its files in one step.

    Raises:
        FileExistsError: If the folder exists and is not empty.
        OSError: If it cannot be written. Nothing is left behind then.
    """
    with _name_in_errors(folder):
        temporary = _write_temporary_folder(folder, files)
        try:
            if _has_content(folder):
                raise FileExistsError(f"{folder} exists")
            os.rename(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(folder.parent)


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace a folder. The old one is deleted after the new one has its name.

    Between two renames neither has the name; both then lie whole beside it.

    Raises:
        OSError: If it cannot be written. The old folder is then unchanged.
    """
    with _name_in_errors(folder):
        temporary = _write_temporary_folder(folder, files)
        old = _temporary_name(folder)
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
    shutil.rmtree(old, ignore_errors=True)  # if this fails, the rest has a temporary name


def check_writable(folder: Path, needed: int = 0) -> None:
    """Check before long work that its results can be written into a folder, or into its nearest parent that exists.

    Writes and removes one byte: permission bits do not stop root, and do not tell whether a file system is read-only,
    full or over a quota.

    Args:
        folder: Where files will be written; need not exist.
        needed: Size of the files in bytes.

    Raises:
        OSError: If the byte cannot be written, or there is less free space than needed.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file; expected a folder to write to")
    probe = _temporary_name(place / "probe")
    with _name_in_errors(place):
        try:
            _write(probe, b"?")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(probe)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{place} has {in_units(free)} free, expected {in_units(needed)}")


def in_units(size: int) -> str:
    """Format a number of bytes with a unit, rounded up."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{-(-10 * size // unit) / 10:g} {name}"
    return f"{size} bytes"


@contextlib.contextmanager
def _name_in_errors(path: Path) -> Iterator[None]:
    """Put ``path`` into the system's errors, which name a temporary file, or none at all (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def is_temporary(name: str, of: str) -> bool:
    """Whether ``name`` is a temporary name of the file ``of``, as a crash in :func:`write_atomically` leaves it."""
    return name.startswith(f".{of}.") and name.endswith(".partial")


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


def _write_temporary_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    temporary = _temporary_name(folder)
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
    # mode "x" does not follow a link that somebody put there
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
