"""Writing the table: several processes may do so at once, and a reader, or a crash, meets it whole.

A writer holds a lock on a file beside the table while it reads, merges and replaces. The system takes the lock
off a process that dies. The lock's file stays: deleting it would let two writers hold two locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlrr_kernels.backends.triton.tuned_file import FORMAT, Entry, OtherFormat, parse, read
from rlrr_kernels.checkpoint import files
from rlrr_kernels.checkpoint.files import is_temporary, write_atomically


def add(path: Path, entries: Iterable[Entry]) -> Path | None:
    """Put entries into the file, in place of those for the same layer, M, GPU, Triton and kernels.

    All other entries stay as they are, those of other versions that this one cannot read included. A file that is
    no table at all is set aside under another name.

    Returns:
        Where a damaged file was set aside, or None.

    Raises:
        OSError: the folder cannot be made, locked or written, or another version of the package wrote the file, which
            is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {_key(entry): entry for entry in entries}
    aside = None
    with _alone(path):
        try:
            old = read(path)
        except OtherFormat as error:
            raise _refusal(path, error) from error
        except ValueError:
            places = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            os.replace(path, aside)
            old = []
        kept = [raw for raw in old if _key_of(raw) not in new]
        rows = [json.dumps(raw, allow_nan=False) for raw in [*kept, *(entry.to_json() for entry in new.values())]]
        content = f'{{"format": {FORMAT}, "entries": [\n' + ",\n".join(rows) + "\n]}\n"
        write_atomically(path, content.encode())
    return aside


def clear(path: Path) -> bool:
    """Delete the file; whether there was one.

    Raises:
        OSError: it cannot be deleted.
    """
    if not path.exists():
        return False
    with _alone(path):
        path.unlink(missing_ok=True)
    return True


def check_writable(path: Path) -> None:
    """Fail before minutes of measuring, not after.

    Raises:
        OSError: the folder cannot be made, locked or written, or another version of the package wrote the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file")
    with _alone(path):
        files.check_writable(path.parent)
        try:
            read(path)
        except OtherFormat as error:
            raise _refusal(path, error) from error
        except ValueError:
            return  # damaged: set aside when there is something to write


def _refusal(path: Path, error: OtherFormat) -> OSError:
    return OSError(f"{path}: another version of rlrr_kernels wrote it ({error}); name another file, or delete it")


def _key(entry: Entry) -> object:
    return entry.where, entry.layer, entry.m


def _key_of(raw: Any) -> object:
    try:
        return _key(parse(raw))
    except ValueError:
        return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else writes the table inside; leftovers of writers that died are removed."""
    try:
        descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(f"{path}: its folder cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise OSError(f"{path}: its file system cannot lock files ({error}); name another place") from error
        for leftover in path.parent.iterdir():
            if is_temporary(leftover.name, path.name):
                leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            # closing alone would leave it taken by a child that was forked meanwhile
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
