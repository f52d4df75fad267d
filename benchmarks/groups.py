"""Raw results as groups: what was measured taking turns, and may therefore be divided by one another."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results

_LAYER = ("model", "layer", "n", "k", "groups", "m", "dtype", "direction")
#: What all rows of a group have in common, by suite.
FIELDS: dict[str, tuple[str, ...]] = {
    "layer": _LAYER,
    "norm": _LAYER,
    "launch": ("call", "dtype"),
    "step": ("model", "batch", "image_size", "dtype"),
}
HEAD = ("suite", "chunk", "date", "device", "processor", "versions", "command", "results")
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
        chunk: the file's head: suite, device, versions, date, command.
        case: what the rows have in common: the fields named in :data:`FIELDS`.
        rows: implementation -> row of the file, failed ones included.
    """

    chunk: Mapping[str, Any]
    case: Mapping[str, Any]
    rows: dict[str, Mapping[str, Any]]

    @property
    def suite(self) -> str:
        return self.chunk["suite"]

    @property
    def ours(self) -> str:
        """The name that stands for this package here."""
        return results.GRAD_SCALES if self.case.get("direction") == "grad_scales" else results.OURS

    def median(self, implementation: str) -> float | None:
        """Seconds; None where it is missing or failed."""
        return self.rows.get(implementation, {}).get("median")

    def speed_up(self, other: str) -> float | None:
        """The other's time / ours: above 1 where ours is faster. None where either is missing."""
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
        """The fastest of them."""
        return min(self.rivals, key=lambda name: self.rows[name]["median"], default=None)

    @property
    def name(self) -> str:
        """As one reads it: "ViT-L/16 fc1, M = 50,432"."""
        case = self.case
        if self.suite == "launch":
            return f"call: {case['call']}"
        if self.suite == "step":
            return f"{case['model']}, batch {case['batch']}"
        return f"{case['model']} {case['layer']}, M = {case['m']:,}"


def is_ours(implementation: str) -> bool:
    """Whether it is this package: its choice, one of its backends, compiled, or a part of it."""
    return implementation.startswith("rlrr_kernels") or implementation in (results.GRAD_SCALES, results.THREE_OPS)


def on_gpu(chunk: Mapping[str, Any]) -> bool:
    return chunk["device"] != "cpu"


def geometric_mean(values: Sequence[float]) -> float:
    """Of one value or more, all above 0."""
    return math.exp(sum(map(math.log, values)) / len(values))


def groups(chunks: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Groups in the order of the files, training steps by model and batch.

    Raises:
        ValueError: a suite is unknown, a row lacks a field, its times are not numbers above 0, or a
            case was measured twice on one device.
    """
    found: dict[tuple[Any, ...], Group] = {}
    for chunk in chunks:
        where = f"chunk {chunk['chunk']!r} of {chunk['device']}"
        fields = FIELDS.get(chunk["suite"])
        if fields is None:
            raise ValueError(f"{where}: expected a suite of {', '.join(FIELDS)}, got {chunk['suite']!r}")
        for row in chunk["results"]:
            _check(row, fields, where)
            case = {name: row[name] for name in fields}
            key = (chunk["device"], chunk["suite"], *case.values())
            group = found.setdefault(key, Group(chunk, case, {}))
            if group.chunk is not chunk and group.chunk["chunk"] == chunk["chunk"]:
                continue  # of two incomplete files of a chunk the first counts: what others took turns with is there
            name = row["implementation"]
            if group.chunk is not chunk or name in group.rows:
                other = group.chunk["chunk"]
                raise ValueError(f"{where}: {group.name}, {case['dtype']}, {name!r} was measured in {other!r} already")
            group.rows[name] = row
    return sorted(found.values(), key=lambda g: (g.case["model"], g.case["batch"]) if g.suite == "step" else ("", 0))


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
    """Chunks of a folder, or of one file.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: a file is no raw result, or a folder holds none.
    """
    if path.is_dir():
        chunks = results.load(path)
        if not chunks:
            raise ValueError(f"{path}: expected raw results of the benchmark suites, found none")
        return chunks
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        chunk = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    missing = [name for name in HEAD if name not in chunk] if isinstance(chunk, dict) else HEAD
    if missing:
        raise ValueError(f"{path}: expected raw results of a benchmark suite, which have {', '.join(missing)}")
    return [chunk]
