"""Files and folders that appear whole: a reader, or a crash, meets the old content or the new."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file, or replace it, so that nobody meets a part of it.

    Raises:
        OSError: it cannot be written. The old file is then as it was, and nothing else is left.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        _write(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder (or into an empty one) so that it appears with all its files at once.

    Raises:
        FileExistsError: the folder exists and is not empty.
        OSError: it cannot be written. Nothing is left behind then.
    """
    temporary = _filled(folder, files)
    try:
        if _has_content(folder):
            raise FileExistsError(f"{folder} exists")
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    _sync_folder(folder.parent)


def replace_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a new folder in an old one's place. The old one is deleted after the new one stands there.

    Between two renames neither is under the name; both are then whole beside it.

    Raises:
        OSError: it cannot be written. The old folder is then as it was.
    """
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
        shutil.rmtree(temporary)
        raise
    _sync_folder(folder.parent)
    shutil.rmtree(old)


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
        shutil.rmtree(temporary)
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
