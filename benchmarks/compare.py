"""Whether a run is slower than an earlier one: ``python -m benchmarks.compare OLD NEW``.

Times of two runs cannot be compared, as clocks and neighbours differ; ratios within a run can. A case's ratio is its
median / that of a yardstick which takes turns with it and has none of this package's code: the plain linear of the same
shape, M, dtype and direction; F.linear's call for calls; LayerNorm alone for norms; and for training steps full
fine-tuning, the plain timm model that every method starts from and every machine can run. A case is slower if the ratio
grew by more than the threshold and the ratios' quartile ranges, the yardstick's included, do not overlap.

Exit status: 1 if a case is slower or fails now, 2 if the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.groups import DIRECTIONS, Group, groups, on_gpu, read

THRESHOLD = 0.05
SLOWER, FAILS, NOISE, SAME, FASTER = "slower", "fails now", "within noise", "same", "faster"
FLAGGED = (SLOWER, FAILS)
YARDSTICKS = {
    "layer": results.PLAIN,
    "norm": results.LAYER_NORM,
    "launch": results.PLAIN,
    "step": results.FULL,
}


@dataclass(frozen=True)
class Ratio:
    """Time / the yardstick's: of the medians, and the least and most that the quartiles allow."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One case in both runs. ``new`` is None if it fails now."""

    case: str
    old: Ratio
    new: Ratio | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """The changes between two runs, and the names of cases without a counterpart or without a ratio."""

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    without_ratio: list[str]

    @property
    def flagged(self) -> list[Change]:
        """The cases that are slower or fail now."""
        return [change for change in self.changes if change.verdict in FLAGGED]


def compare(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], threshold: float = THRESHOLD
) -> Comparison:
    """Compare every case of two runs, each given as its chunks.

    Args:
        old: The earlier run.
        new: The later run.
        threshold: How much a ratio may grow, as a share of the old one.

    Raises:
        ValueError: If the runs are of different devices, have no dtype or no case with a ratio in common, or are not
            valid (:func:`benchmarks.groups.groups`).
    """
    devices = [_device(chunks) for chunks in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(f"different devices do not compare: {devices[0]} and {devices[1]}")
    before, after = _cases(groups(old)), _cases(groups(new))
    dtypes = [sorted({group.case["dtype"] for group, _ in cases.values()}) for cases in (before, after)]
    if not set(dtypes[0]) & set(dtypes[1]):
        raise ValueError(f"different dtypes do not compare: {', '.join(dtypes[0])} and {', '.join(dtypes[1])}")
    common = [case for case in before if case in after]
    changes, without = [], []
    for case in common:
        first, second = _ratio(*before[case]), _ratio(*after[case])
        group, name = after[case]
        if first is None or (second is None and "error" not in group.rows[name]):
            without.append(case)
        else:
            changes.append(Change(case, first, second, _verdict(first, second, threshold)))
    if not changes:
        raise ValueError(f"the runs have no case with a ratio in common: {len(before)} cases and {len(after)}")
    return Comparison(
        changes,
        only_old=[case for case in before if case not in after],
        only_new=[case for case in after if case not in before],
        without_ratio=without,
    )


def _device(chunks: Iterable[Mapping[str, Any]]) -> str:
    names = sorted({c["device"] if on_gpu(c) else f"cpu ({c['processor']})" for c in chunks})
    if len(names) != 1:
        raise ValueError(f"expected one device in a run, got {', '.join(names)}")
    return names[0]


def _yardstick(group: Group) -> str:
    return results.BARE_GRAD if group.case.get("direction") == "grad_scales" else YARDSTICKS[group.suite]


def _cases(found: Iterable[Group]) -> dict[str, tuple[Group, str]]:
    """Return for each case, by name, its group and implementation, without yardsticks."""
    cases = {}
    for group in found:
        direction = DIRECTIONS.get(group.case.get("direction", ""), "")
        size = ", ".join(
            f"{name} {group.case[name]}" for name in ("n", "k", "groups", "image_size") if name in group.case
        )
        where = ", ".join(
            part for part in (f"{group.suite}: {group.name}", size, group.case["dtype"], direction) if part
        )
        for name in group.rows:
            if name != _yardstick(group):
                cases[f"{where}, {name}"] = group, name
    return cases


def _ratio(group: Group, name: str) -> Ratio | None:
    row, base = group.rows[name], group.rows.get(_yardstick(group), {})
    if "median" not in row or "median" not in base:
        return None
    return Ratio(row["median"] / base["median"], row["q1"] / base["q3"], row["q3"] / base["q1"])


def _verdict(old: Ratio, new: Ratio | None, threshold: float) -> str:
    if new is None:
        return FAILS
    growth = new.middle / old.middle - 1
    if abs(growth) <= threshold:
        return SAME
    if new.low <= old.high and old.low <= new.high:
        return NOISE
    return SLOWER if growth > 0 else FASTER


def table(changes: Sequence[Change]) -> str:
    """As Markdown, the worst first; ratios are times over the yardstick's."""
    rows = sorted(changes, key=lambda c: -_growth(c))
    lines = ["| case | old | new | change | verdict |", "| --- | ---: | ---: | ---: | --- |"]
    for c in rows:
        new, growth = ("", "") if c.new is None else (f"{c.new.middle:.3f}", f"{_growth(c):+.1%}")
        lines.append(f"| {c.case} | {c.old.middle:.3f} | {new} | {growth} | {c.verdict} |")
    return "\n".join(lines)


def _growth(change: Change) -> float:
    return float("inf") if change.new is None else change.new.middle / change.old.middle - 1


def _runs(chunks: Iterable[Mapping[str, Any]]) -> str:
    """Dates and versions, so that a change of torch is not read as one of this package."""
    dates = ", ".join(sorted({c["date"] for c in chunks}))
    versions = sorted({(name, str(version)) for c in chunks for name, version in c["versions"].items() if version})
    return f"{dates}; " + ", ".join(f"{name} {version}" for name, version in versions)


def report(comparison: Comparison, everything: bool) -> str:
    """Table and counts. ``everything``: also the cases that stayed the same or got faster."""
    counts = Counter(change.verdict for change in comparison.changes)
    shown = [c for c in comparison.changes if everything or c.verdict in (*FLAGGED, NOISE)]
    lines = [table(shown), ""] if shown else []
    lines.append(", ".join(f"{counts[v]} {v}" for v in (SLOWER, FAILS, NOISE, SAME, FASTER)))
    for title, cases in (
        ("only in OLD", comparison.only_old),
        ("only in NEW", comparison.only_new),
        ("without a ratio (the case or its yardstick is missing or failed)", comparison.without_ratio),
    ):
        if cases:
            lines += [f"{len(cases)} {title}:", *(f"  {case}" for case in cases)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and say by the exit status whether something is slower."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("old", type=Path, help="a raw result, or a folder of them")
    parser.add_argument("new", type=Path, help="the same, of the later run")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help="growth that is allowed (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="list also the cases that did not get slower")
    args = parser.parse_args(arguments)
    if not 0 <= args.threshold < float("inf"):
        parser.error(f"argument --threshold: expected a share of 0 or more, got {args.threshold}")
    try:
        old, new = read(args.old), read(args.new)
        comparison = compare(old, new, args.threshold)
    except (OSError, ValueError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    print(f"old: {_runs(old)}\nnew: {_runs(new)}\n\n{report(comparison, args.all)}")
    return 1 if comparison.flagged else 0


if __name__ == "__main__":
    sys.exit(main())
