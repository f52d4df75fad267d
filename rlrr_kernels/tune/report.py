"""Tables for people: what will be measured, what was found, what is stored."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from rich.console import Console
from rich.table import Table

from rlrr_kernels.backends import tuned
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.tuned import Entry
from rlrr_kernels.tune.candidates import Candidate, describe
from rlrr_kernels.tune.contest import Result

_RIGHT = {"default, us", "best, us", "gain"}


def console() -> Console:
    """The terminal; a log file has no width, and cut columns say nothing."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in _RIGHT else "left")
    return table


def show_plan(plan: Iterable[tuple[str, Problem, Sequence[Candidate]]], title: str, out: Console) -> None:
    """Layers, problem and candidates of each contest to come."""
    table = _table(title, "layers", "pass", "candidates", "default")
    for layers, problem, found in plan:
        counts = Counter(one.backend for one in found)
        table.add_row(
            layers or "-", describe(problem), ", ".join(f"{n} {name}" for name, n in counts.items()), str(found[0])
        )
    out.print(table)


def show_results(results: Iterable[Result], layers: Mapping[Problem, str], title: str, out: Console) -> None:
    """Default against best, and what was left out and why."""
    results = list(results)
    table = _table(title, "layers", "pass", "default", "default, us", "best, us", "gain", "best")
    for result in results:
        gain = "-" if result.gain is None else f"{result.gain - 1:+.1%}"
        times = (result.spreads.get(one) if one else None for one in (result.default, result.best))
        best = "nothing could be measured" if result.best is None else str(result.best)
        table.add_row(
            *(layers.get(result.problem) or "-", describe(result.problem), str(result.default)),
            *("-" if spread is None else f"{spread.median * 1e6:.1f}" for spread in times),
            *(gain, "the default" if result.best == result.default else best),
        )
    out.print(table)
    for result in results:
        for one, why in result.failures.items():
            whose = ", the default" if one == result.default else ""
            out.print(f"left out: {describe(result.problem)}: {one}{whose}: {why}", markup=False, highlight=False)


def show_stored(entries: Iterable[Entry], device: torch.device, title: str, out: Console) -> None:
    """The entries of a file; those that do not hold on the device, with what is installed, are marked."""
    table = _table(title, "device", "what", "backend", "tile", "gain", "state")
    for entry in entries:
        before, after = (entry.measured.get(name) for name in ("default_seconds", "seconds"))
        gain = f"{before / after - 1:+.1%}" if isinstance(before, float) and isinstance(after, float) and after else "-"
        tile = "its own" if entry.tile is None else " ".join(f"{name}={value}" for name, value in entry.tile.items())
        state = "used" if tuned.holds(entry, device) else "not used: of another device, or of other versions"
        table.add_row(entry.device, str(entry), entry.backend, tile, gain, state)
    out.print(table)
