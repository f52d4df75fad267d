"""The table that ends a session of the suites: each group's others over ours, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks import results
from benchmarks.groups import Group
from benchmarks.tables import column

#: What shows the scale, by suite: less than the function, or another one.
SCALE = {
    "layer": (results.PLAIN, results.PRODUCTS, results.BARE_GRAD),
    "norm": (results.LAYER_NORM,),
    "launch": (results.PLAIN,),
    "step": (results.PROBE,),
}
HEADS = ("", "dtype", "", "formula", "best other way to the same", "for scale", "our memory / formula's")


def table(found: Iterable[Group]) -> str:
    """A line for each group; empty where something was not measured.

    Memory is the peak beyond inputs and outputs, of a training step all of it.
    """
    rows = []
    for group in found:
        formula = results.OFFICIAL if group.suite == "step" else results.FORMULA
        best = group.best_rival
        scale = (
            f"{name} {value}" for name in SCALE[group.suite] if name in group.rows and (value := _time(group, name))
        )
        rows.append(
            [
                *(group.name, group.case["dtype"], column(group), _time(group, formula)),
                "" if best is None or group.median(group.ours) is None else f"{_time(group, best)} {best}",
                ", ".join(scale),
                _memory(group, formula),
            ]
        )
    return _aligned([HEADS, *rows])


def _time(group: Group, other: str) -> str:
    ratio = group.speed_up(other)
    if ratio is not None:
        return f"{ratio:.2f}"
    return "failed" if any("error" in group.rows[name] for name in {group.ours, other} & group.rows.keys()) else ""


def _memory(group: Group, formula: str) -> str:
    field = "peak_bytes" if group.suite == "step" else "extra_bytes"
    ours, theirs = (group.rows.get(name, {}).get(field) for name in (group.ours, formula))
    return f"{ours / theirs:.2f}" if ours is not None and theirs else ""


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
