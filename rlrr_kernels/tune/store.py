"""Writing the table of choices: several processes may do so at once (:mod:`rlrr_kernels.cachefile`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlrr_kernels import cachefile
from rlrr_kernels.backends.triton.tuned_file import FORMAT, Entry, parse


def add(path: Path, entries: Iterable[Entry]) -> Path | None:
    """Put entries into the file, in place of those for the same layer, M, GPU, Triton and kernels.

    All else is as :func:`rlrr_kernels.cachefile.add` says.
    """
    return cachefile.add(path, FORMAT, {_key(entry): entry.to_json() for entry in entries}, _key_of)


def _key(entry: Entry) -> object:
    return entry.where, entry.layer, entry.m


def _key_of(raw: Any) -> object:
    try:
        return _key(parse(raw))
    except ValueError:
        return None
