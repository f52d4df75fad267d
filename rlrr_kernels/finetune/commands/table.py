"""``rlrr-finetune table``: accuracies over tasks and seeds, beside the paper's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands import results
from rlrr_kernels.finetune.commands.common import Command, Grid, checking_input, console
from rlrr_kernels.finetune.commands.results import Cell, Clash, Column
from rlrr_kernels.finetune.recipes import PUBLISHED, PublishedMean
from rlrr_kernels.finetune.settings import format_value

FORMATS = ("console", "markdown", "json")
MISSING = "-"
#: The protocol of the paper's RLRR figures, and the mark of every figure of that protocol.
ON_TEST = "best-on-test"
MARK = "*"
#: The mark of a method with options that are not defaults. A note lists them.
CHANGED = "†"
NOTES = {
    ON_TEST: f"{MARK} best-on-test: the epoch was chosen on the test images, as in the paper's code. "
    "Such a figure is higher than one of the other protocols for the same model.",
    "std": "± is the sample standard deviation over seeds, (n) their number; no sign: one seed.",
    "clashes": "No seeds of one experiment, so that none of them is above: name the folders that belong together.",
    "groups": "Mean over tasks: each task counts the same. Mean of group means: each group does.",
}

DESCRIPTION = """\
Test accuracy by task, from the metrics.json of runs and sweeps. Runs of one model,
method and protocol make a column; what defines the method counts, such as its start,
its affines, its rank, precision or checkpoint. Seeds of one task are averaged. Where
tasks of a mean were trained with different other settings, these are named below it.
Runs and sweeps without a test figure, or that cannot be read, are left out, and named;
so are runs of a column and task that differ in more than the seed, or not at all. For VTAB-1k there
are two means, over tasks and of the three groups' means, and both say over how many
tasks they are: a missing task is shown as missing and counts for nothing. The paper's
means stand below them, with the protocol they were made by.
"""

Columns = Mapping[Column, Mapping[str, Cell]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", type=Path, nargs="+", metavar="PATH", help="run folders, sweep folders, or folders that hold such"
    )
    parser.add_argument("--format", choices=FORMATS, default="console", help="default: console")


def run(arguments: argparse.Namespace) -> int:
    with checking_input():
        found, left_out = results.find_results(arguments.paths)
        if not found:
            raise ValueError(f"no run in {', '.join(map(str, arguments.paths))} was tested: {'; '.join(left_out)}")
    columns, clashes = results.cells(found)
    if arguments.format == "json":
        print(json.dumps(summary(columns, clashes, left_out), indent=2))
        return 0
    grids = [grid for name in results.benchmarks(columns) for grid in _benchmark_grids(name, columns)]
    grids += [_clash_grid(clashes)] if clashes else []
    if arguments.format == "markdown":
        print("\n".join(grid.markdown() for grid in grids))
        print("\n".join(f"left out: {line}  " for line in left_out))
    else:
        for grid in grids:
            console().print(grid.rich(), "")
        for line in left_out:
            console().print(f"left out: {line}", markup=False, highlight=False)
    return 0


def _percent(accuracy: float, protocol: str = "") -> str:
    return f"{100 * accuracy:.1f}{MARK if protocol == ON_TEST else ''}"


def _benchmark_grids(benchmark: str, columns: Columns) -> list[Grid]:
    """The accuracies by task, and their means."""
    groups = results.tasks_of(benchmark)
    if not groups:
        known = {t for name in results.benchmarks(columns) for ts in results.tasks_of(name).values() for t in ts}
        groups = {"": tuple(sorted({task for cells in columns.values() for task in cells} - known))}
    grouped = len(groups) > 1
    wanted = {task for tasks in groups.values() for task in tasks}
    used = {column: cells for column, cells in columns.items() if wanted & cells.keys()}
    header = (*["group"] * grouped, "task", *(f"{i} {column.method}" for i, column in enumerate(used, 1)))
    title = f"{benchmark or 'other data'}: test accuracy, %"
    grid = Grid(title, header, labels=1 + grouped, notes=[NOTES["std"]])
    for group, tasks in groups.items():
        for task in tasks:
            figures = [_figure(cells[task], column) if task in cells else MISSING for column, cells in used.items()]
            grid.add(*[group] * grouped, task.removeprefix(f"{benchmark}/") if benchmark else task, *figures)
        grid.end_section()
    return [grid, _mean_grid(benchmark, used)]


def _figure(cell: Cell, column: Column) -> str:
    spread = "" if cell.std is None else f" ± {100 * cell.std:.1f} ({len(cell.seeds)})"
    return _percent(cell.mean, column.protocol) + spread


def _mean_grid(benchmark: str, columns: Columns) -> Grid:
    """A row for each column of the table before, and for each published mean."""
    groups = results.tasks_of(benchmark)
    grouped = len(groups) > 1
    header = ["", "method", "model", "protocol", "seeds"]
    if benchmark:
        header += ["tasks", "mean over tasks"]
    if grouped:
        header += [*groups, "mean of group means"]
    grid = Grid(f"{benchmark or 'other data'}: columns{' and means' if benchmark else ''}", header, labels=4)
    protocols = {column.protocol for column in columns}
    for number, (column, cells) in enumerate(columns.items(), 1):
        mark = MARK if column.protocol == ON_TEST else ""
        method = f"{column.method} {CHANGED}" if column.changed else column.method
        row = [str(number), method, column.model, column.protocol + mark, _seeds(benchmark, cells)]
        means = results.means(benchmark, cells)
        if means is not None:
            row += [f"{means.tasks} of {means.of_tasks}", _percent(means.over_tasks, column.protocol)]
            if means.of_groups is not None:
                row += [_percent(means.groups[g], column.protocol) if g in means.groups else MISSING for g in groups]
                over = "" if len(means.groups) == len(groups) else f" (of {len(means.groups)} groups)"
                row += [_percent(means.of_groups, column.protocol) + over]
        grid.add(*row)
        if column.changed:
            grid.notes.append(f"{CHANGED} Column {number} is {column.method} with {column.changed}.")
        if note := _differing_note(number, results.differing(benchmark, cells)):
            grid.notes.append(note)
    grid.end_section()
    for published in PUBLISHED:
        if published.benchmark == benchmark:
            protocol = _published_protocol(published)
            protocols.add(protocol)
            mark = MARK if protocol == ON_TEST else ""
            count = sum(map(len, groups.values()))
            row = ["paper", published.method, published.model, protocol + mark, MISSING, f"{count} of {count}"]
            row.append(f"{published.accuracy:.1f}{mark}")
            grid.add(*row, *[MISSING] * (len(header) - len(row)))
    if grouped:
        grid.notes.append(NOTES["groups"])
    if ON_TEST in protocols:
        grid.notes.append(NOTES[ON_TEST])
    return grid


def _published_protocol(published: PublishedMean) -> str:
    return ON_TEST if published.method == "RLRR" else "as published"


def _differing_note(number: int, names: Mapping[str, str]) -> str:
    recipe, given = (", ".join(name for name, kind in names.items() if kind == of) for of in ("recipe", "given"))
    parts = "; ".join(part for part in (recipe and f"{recipe} (as in their recipes)", given) if part)
    return f"Column {number} averages over tasks that differ in {parts}." if parts else ""


def _clash_grid(clashes: list[Clash]) -> Grid:
    grid = Grid("runs that clash", ("task", "run", "what clashes", "test accuracy, %"), labels=3)
    for clash in clashes:
        for run in clash.runs:
            names = ["seed", *clash.differ]
            values = ", ".join(f"{name} {format_value(run.settings.get(name))}" for name in names)
            grid.add(clash.task, str(run.folder), values, _percent(run.accuracy, run.column.protocol))
        grid.end_section()
    grid.notes.append(NOTES["clashes"])
    return grid


def _seeds(benchmark: str, cells: Mapping[str, Cell]) -> str:
    counts = {len(cell.seeds) for task, cell in cells.items() if not benchmark or task.startswith(f"{benchmark}/")}
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"


def summary(columns: Columns, clashes: list[Clash], left_out: list[str]) -> dict[str, Any]:
    """The output of ``--format json``. Accuracies are from 0 to 1, and missing tasks are listed."""
    listed = []
    for column, cells in columns.items():
        entry: dict[str, Any] = {"model": column.model, "method": column.method, "protocol": column.protocol}
        entry["settings"] = dict(column.options)
        entry["tasks"] = {
            task: {"mean": cell.mean, "std": cell.std, "seeds": list(cell.seeds), "accuracies": list(cell.accuracies)}
            for task, cell in sorted(cells.items())
        }
        entry["benchmarks"] = {}
        for benchmark in results.benchmarks({column: cells}):
            means = results.means(benchmark, cells)
            if means is not None:
                entry["benchmarks"][benchmark] = {
                    "mean_over_tasks": means.over_tasks,
                    "mean_of_group_means": means.of_groups,
                    "groups": dict(means.groups),
                    "tasks": means.tasks,
                    "of_tasks": means.of_tasks,
                    "differ": results.differing(benchmark, cells),
                    "missing": [t for ts in results.tasks_of(benchmark).values() for t in ts if t not in cells],
                }
        listed.append(entry)
    published = [
        {
            "benchmark": p.benchmark,
            "method": p.method,
            "model": p.model,
            "mean_over_tasks": p.accuracy / 100,
            "protocol": _published_protocol(p),
        }
        for p in PUBLISHED
        if any(p.benchmark in entry["benchmarks"] for entry in listed)
    ]
    clashing = [
        {
            "task": clash.task,
            "differ": list(clash.differ),
            "runs": [
                {"folder": str(run.folder), "accuracy": run.accuracy, "settings": dict(run.settings)}
                for run in clash.runs
            ],
        }
        for clash in clashes
    ]
    return {"columns": listed, "published": published, "clashes": clashing, "left_out": left_out}


COMMAND = Command("accuracies over tasks and seeds, next to the paper's", DESCRIPTION, add_arguments, run)
