"""Raw results as groups: what was measured in turns and may therefore be divided by one another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results

_LAYER = ("model", "layer", "n", "k", "groups", "m", "dtype", "direction", "rank")
#: What all rows of a group have in common, by suite.
FIELDS: dict[str, tuple[str, ...]] = {
    "layer": _LAYER,
    "norm": _LAYER,
    "launch": ("call", "dtype", "rank"),
    "step": ("model", "batch", "image_size", "dtype", "rank"),
}
DIRECTIONS = {
    "forward": "forward",
    "forward_no_grad": "forward, no graph",
    "backward": "backward",
    "both": "forward + backward",
    "grad_scales": "u, v and f gradients alone",
}


@dataclass(frozen=True)
class Group:
    """One shape, dtype and direction (or step, or call) on one device, in one run.

    Attributes:
        chunk: The file's head: suite, device, versions, date, command.
        case: What the rows have in common: the fields named in :data:`FIELDS`.
        rows: Implementation -> row of the file, also if it failed.
    """

    chunk: Mapping[str, Any]
    case: Mapping[str, Any]
    rows: dict[str, Mapping[str, Any]]

    @property
    def suite(self) -> str:
        """The suite of its chunk."""
        return self.chunk["suite"]

    @property
    def ours(self) -> str:
        """The implementation that stands for this package here."""
        return results.GRAD_SCALES if self.case.get("direction") == "grad_scales" else results.OURS

    def median(self, implementation: str) -> float | None:
        """Return the median in seconds; None if it is missing or failed."""
        return self.rows.get(implementation, {}).get("median")

    def speed_up(self, other: str) -> float | None:
        """Return the other's time / ours: above 1 where ours is faster. None if either is missing."""
        ours, theirs = self.median(self.ours), self.median(other)
        return None if ours is None or theirs is None else theirs / ours

    @property
    def rivals(self) -> list[str]:
        """Other ways to compute the same function that ran here."""
        return [
            name
            for name, row in self.rows.items()
            if not is_ours(name) and row.get("same_function") and "median" in row
        ]

    @property
    def best_rival(self) -> str | None:
        """The fastest rival."""
        return min(self.rivals, key=lambda name: self.rows[name]["median"], default=None)

    @property
    def name(self) -> str:
        """A readable name: "ViT-L/16 fc1, M = 50,432, r = 8"; rank 1 is not in it."""
        case = self.case
        rank = "" if case["rank"] == 1 else f", r = {case['rank']}"
        if self.suite == "launch":
            return f"call: {case['call']}{rank}"
        if self.suite == "step":
            return f"{case['model']}, batch {case['batch']}{rank}"
        return f"{case['model']} {case['layer']}, M = {case['m']:,}{rank}"


def is_ours(implementation: str) -> bool:
    """Return whether it is this package: its choice, one of its backends, compiled, or a part of it."""
    return implementation.startswith("rlrr_kernels") or implementation in (results.GRAD_SCALES, results.THREE_OPS)


def on_gpu(chunk: Mapping[str, Any]) -> bool:
    """Return whether a chunk was measured on a GPU."""
    return chunk["device"] != "cpu"


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of one value or more, all above 0."""
    return math.exp(sum(map(math.log, values)) / len(values))


def groups(chunks: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Return groups in the order of the files; training steps by model, batch and rank.

    Raises:
        ValueError: If a suite is unknown, a row lacks a field, a time is not a number above 0, or a case was measured
            twice on one device.
    """
    found: dict[tuple[Any, ...], Group] = {}
    for chunk in chunks:
        where = f"chunk {chunk['chunk']!r} of {chunk['device']}"
        fields = FIELDS.get(chunk["suite"])
        if fields is None:
            raise ValueError(f"{where}: expected a suite of {', '.join(FIELDS)}, got {chunk['suite']!r}")
        for row in chunk["results"]:
            row = {"rank": 1} | row  # results from before ranks have none
            _check(row, fields, where)
            case = {name: row[name] for name in fields}
            key = (chunk["device"], chunk["suite"], *case.values())
            group = found.setdefault(key, Group(chunk, case, {}))
            if group.chunk is not chunk and group.chunk["chunk"] == chunk["chunk"]:
                continue  # of two incomplete files of a chunk the first counts
            name = row["implementation"]
            if group.chunk is not chunk or name in group.rows:
                other = group.chunk["chunk"]
                raise ValueError(f"{where}: {group.name}, {case['dtype']}, {name!r} was measured in {other!r} already")
            group.rows[name] = row
    order = ("model", "batch", "rank")
    return sorted(found.values(), key=lambda g: [g.case[name] for name in order] if g.suite == "step" else ["", 0, 0])


def _check(row: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    missing = [name for name in (*fields, "implementation") if name not in row]
    if "error" not in row:
        missing += [name for name in ("median", "q1", "q3") if name not in row]
    if missing:
        raise ValueError(f"{where}: a result lacks {', '.join(missing)}: {json.dumps(row)[:200]}")
    if "error" in row:
        return
    for name in ("q1", "median", "q3"):
        if not isinstance(row[name], int | float) or not 0 < row[name] < math.inf:
            raise ValueError(f"{where}: expected seconds above 0 in {name!r}, got {row[name]!r}")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the chunks of a folder, or of one file.

    Raises:
        FileNotFoundError: If there is no such path.
        ValueError: If a file is no raw result, or a folder holds none.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    chunk = None if path.is_dir() else results.read(path)
    chunks = results.load(path) if path.is_dir() else [] if chunk is None else [chunk]
    if not chunks:
        raise ValueError(f"{path}: expected raw results of the benchmark suites, found none")
    return chunks
