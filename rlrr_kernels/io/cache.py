"""Small tables in the user's cache folder, which several processes may write at once.

A table is a JSON file::

    {"format": 1, "entries": [{...}, ...]}

It is always replaced as a whole. A writer holds a lock on a file beside the table while it reads, merges and replaces;
the system releases the lock of a process that dies. The lock's file stays: if it were deleted, two writers could hold
two locks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlrr_kernels.io import files
from rlrr_kernels.io.checks import parse_json

_MAX_BYTES = 64 * 2**20


class Entry(Protocol):
    """An entry of a table."""

    @property
    def key(self) -> object:
        """A new entry replaces the one with the same key."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The entry as an object of the file."""
        ...


E = TypeVar("E", bound=Entry)


class OtherFormatError(ValueError):
    """Another version of the package wrote the table: it is not damaged, and not for this one to change."""


def default_file(variable: str, name: str) -> Path | None:
    """The path in this environment variable, else a file in the user's cache folder; None if there is no home."""
    named = os.environ.get(variable)
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the XDG standard says to ignore relative paths
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            return None
    return cache / "rlrr_kernels" / name


def read(path: Path, layout: int) -> list[Any]:
    """Return the unchecked entries of a table, or an empty list if there is no file.

    Args:
        path: The file.
        layout: The ``format`` that it must have.

    Raises:
        OSError: If it cannot be read.
        OtherFormatError: If another version of the package wrote it.
        ValueError: If it is no table, or too large.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return []
    # opening a pipe would wait for its writer
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
        raise ValueError(f"expected a file of up to {_MAX_BYTES // 2**20} MiB")
    # finite, so that it can be written again as JSON
    content = parse_json(path.read_bytes(), "the content", finite=True)
    if not isinstance(content.get("entries"), list):
        raise ValueError('expected {"format": ..., "entries": [...]}')
    if content.get("format") != layout:
        raise OtherFormatError(f"format: expected {layout}, got {content.get('format')!r}")
    return content["entries"]


def load(path: Path, layout: int, parse: Callable[[Any], E], consequence: str, missing: str | None = None) -> list[E]:
    """Read and parse the entries of a table. Never raises for what is in the file.

    Entries that cannot be used are left out with one warning that names the file and the first reason.

    Args:
        path: The file.
        layout: The ``format`` that it must have.
        parse: Checks one entry; raises ValueError if it cannot be used.
        consequence: The end of the warning.
        missing: A reason to warn of if there is no file.
    """
    entries, problems = [], []
    try:
        raw = read(path, layout)
        if not raw and missing and not path.exists():
            problems.append(missing)
    except (OSError, ValueError) as error:
        raw = []
        problems.append(str(error))
    for index, one in enumerate(raw):
        try:
            entries.append(parse(one))
        except ValueError as error:
            problems.append(f"entry {index}: {error}")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        _warn(f"rlrr_kernels: {path}: {problems[0]}{more}; {consequence}")
    return entries


def _warn(message: str) -> None:
    # a filter that turns warnings into errors must not stop a training run because of a cache
    try:
        warnings.warn(message, stacklevel=2)
    except UserWarning:
        print(message, file=sys.stderr)


def add(path: Path, layout: int, new: Iterable[E], parse: Callable[[Any], E]) -> Path | None:
    """Put entries into a table, in place of those with the same key.

    All other entries are kept, also those that ``parse`` refuses, as other versions may have written them. A file
    that is no table is renamed.

    Args:
        path: The file; its folder is created if necessary.
        layout: The ``format`` of the file.
        new: The entries.
        parse: Checks an entry of the file; raises ValueError if it is of another version.

    Returns:
        The new name of a damaged file, or None.

    Raises:
        OSError: If the folder cannot be created, locked or written, or if another version of the package wrote the
            file, which is then unchanged.
    """
    entries = {entry.key: entry.to_json() for entry in new}

    def is_replaced(raw: Any) -> bool:
        try:
            return parse(raw).key in entries
        except ValueError:
            return False

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = None
    with lock(path):
        try:
            old = _read_own(path, layout)
        except ValueError:
            places = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            os.replace(path, aside)
            old = []
        kept = [raw for raw in old if not is_replaced(raw)]
        rows = [json.dumps(raw, allow_nan=False) for raw in [*kept, *entries.values()]]
        content = f'{{"format": {layout}, "entries": [\n' + ",\n".join(rows) + "\n]}\n"
        files.write_atomically(path, content.encode())
    return aside


def clear(path: Path) -> bool:
    """Delete the file, and return whether there was one.

    Raises:
        OSError: If it cannot be deleted.
    """
    if not path.exists():
        return False
    with lock(path):
        path.unlink(missing_ok=True)
    return True


def check_writable(path: Path, layout: int) -> None:
    """Check before minutes of measuring that a table can be written. A damaged one can: it is renamed by :func:`add`.

    Raises:
        OSError: If its folder cannot be created, locked or written, or another version of the package wrote the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file")
    with lock(path):
        files.check_writable(path.parent)
        with contextlib.suppress(ValueError):
            _read_own(path, layout)


def _read_own(path: Path, layout: int) -> list[Any]:
    """As :func:`read`, but a table of another version is an OSError."""
    try:
        return read(path, layout)
    except OtherFormatError as error:
        raise OSError(
            f"{path}: another version of rlrr_kernels wrote it ({error}); name another file, or delete it"
        ) from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep other writers of the table waiting, and remove the temporary files of writers that died."""
    import fcntl  # not available on Windows, where tables can be read but not written

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
            if files.is_temporary(leftover.name, path.name):
                leftover.unlink(missing_ok=True)
        try:
            yield
        finally:
            # closing alone would leave the lock with a child process that was forked meanwhile
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
