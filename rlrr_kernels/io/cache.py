"""Small tables in the user's cache folder: JSON that is read with suspicion, and written whole.

Several processes may write at once, and a reader, or a crash, meets a table whole. A writer holds a lock on a file
beside the table while it reads, merges and replaces. The system takes the lock off a process that dies. The lock's
file stays: deleting it would let two writers hold two locks. A file is::

    {"format": 1, "entries": [{...}, ...]}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

_MAX_BYTES = 64 * 2**20

Entry = TypeVar("Entry")


class OtherFormat(ValueError):
    """A table of another version of the package: whole, but not for this one to read or change."""


def default_file(variable: str, name: str) -> Path | None:
    """What the environment variable names, else a file in the user's cache folder; None where there is no home."""
    named = os.environ.get(variable)
    if named:
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # the standard says to ignore those
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            return None
    return cache / "rlrr_kernels" / name


def _finite(digits: str) -> float:
    """Also of the words ``NaN`` and ``Infinity``. Raises ValueError for what :func:`add` could not write again."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {digits:.40}")
    return number


def read(path: Path, layout: int) -> list[Any]:
    """The raw entries of a file with this ``format``; none if there is no file.

    Raises:
        OSError: it cannot be read.
        OtherFormat: another version of the package wrote it.
        ValueError: it holds something else, and what.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return []
    # a pipe would wait for its writer
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
        raise ValueError(f"expected a file of up to {_MAX_BYTES // 2**20} MiB")
    try:
        content = json.loads(path.read_bytes(), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError('expected {"format": ..., "entries": [...]}')
    if content.get("format") != layout:
        raise OtherFormat(f"format: expected {layout}, got {content.get('format')!r}")
    return content["entries"]


def load(
    path: Path,
    read: Callable[[Path], list[Any]],
    parse: Callable[[Any], Entry],
    consequence: str,
    missing: str | None = None,
) -> list[Entry]:
    """The entries that ``parse`` takes.

    What cannot be used is left out with one warning that names the file, the first reason and the ``consequence``.
    ``missing``: what to say where there is no file, if that is worth a warning.
    """
    entries, bad = [], []
    try:
        raw = read(path)
        if not raw and missing and not path.exists():
            bad.append(missing)
    except (OSError, ValueError) as error:
        raw = []
        bad.append(str(error))
    for index, one in enumerate(raw):
        try:
            entries.append(parse(one))
        except ValueError as error:
            bad.append(f"entry {index}: {error}")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        _warn(f"rlrr_kernels: {path}: {bad[0]}{more}; {consequence}")
    return entries


def _warn(message: str) -> None:
    # a filter that makes errors of warnings would stop a training run for a cache
    try:
        warnings.warn(message, stacklevel=2)
    except UserWarning:
        print(message, file=sys.stderr)


def text(values: Mapping[str, Any], name: str) -> str:
    """A field that must be a string with something in it.

    Raises:
        ValueError: it is not.
    """
    value = values.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}: expected a name, got {value!r:.40}")
    return value


def add(
    path: Path, layout: int, new: Mapping[object, Mapping[str, Any]], key_of: Callable[[Any], object]
) -> Path | None:
    """Put entries into the file, in place of those with the same key.

    All other entries stay as they are, those of other versions that this one cannot read included. A file that is
    no table at all is set aside under another name.

    Args:
        path: the file; its folder is made where it is missing.
        layout: the file's ``format``.
        new: key -> entry.
        key_of: the key of a raw entry of the file; None for one that cannot be read.

    Returns:
        Where a damaged file was set aside, or None.

    Raises:
        OSError: the folder cannot be made, locked or written, or another version of the package wrote the file, which
            is then as it was.
    """
    from rlrr_kernels.io.files import write_atomically  # of a package that imports the readers of tables

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = None
    with alone(path):
        try:
            old = read(path, layout)
        except OtherFormat as error:
            raise _refusal(path, error) from error
        except ValueError:
            places = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
            aside = next(place for place in places if not place.exists())
            os.replace(path, aside)
            old = []
        kept = [raw for raw in old if key_of(raw) not in new]
        rows = [json.dumps(raw, allow_nan=False) for raw in [*kept, *new.values()]]
        content = f'{{"format": {layout}, "entries": [\n' + ",\n".join(rows) + "\n]}\n"
        write_atomically(path, content.encode())
    return aside


def clear(path: Path) -> bool:
    """Delete the file; whether there was one.

    Raises:
        OSError: it cannot be deleted.
    """
    if not path.exists():
        return False
    with alone(path):
        path.unlink(missing_ok=True)
    return True


def check_writable(path: Path, layout: int) -> None:
    """Fail before minutes of measuring, not after.

    Raises:
        OSError: the folder cannot be made, locked or written, or another version of the package wrote the file.
    """
    from rlrr_kernels.io import files

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file")
    with alone(path):
        files.check_writable(path.parent)
        try:
            read(path, layout)
        except OtherFormat as error:
            raise _refusal(path, error) from error
        except ValueError:
            return  # damaged: set aside when there is something to write


def _refusal(path: Path, error: OtherFormat) -> OSError:
    return OSError(f"{path}: another version of rlrr_kernels wrote it ({error}); name another file, or delete it")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else writes the table inside; leftovers of writers that died are removed."""
    import fcntl  # Windows has none, and reading needs none

    from rlrr_kernels.io.files import is_temporary

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
