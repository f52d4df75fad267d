"""Tested runs on disk, and their means over seeds, tasks and groups of tasks."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands.sweep_folder import check_run_folder
from rlrr_kernels.finetune.recipes import TASKS, VTAB_GROUPS, recipe
from rlrr_kernels.finetune.saved_run import read_metrics
from rlrr_kernels.finetune.settings import DEFAULTS, format_value
from rlrr_kernels.io.checks import expect, read_json

#: Settings in which runs that are averaged may differ: the seed, and those that do not change results.
MAY_DIFFER = frozenset(
    {"seed", "out", "resume", "data_root", "device", "workers", "cache", "tensorboard", "parallel", "compile"}
)

#: Settings that define a method, whatever it is trained on; and those that only one method reads.
DEFINING = ("checkpoint", "pretrained", "head_init", "img_size", "precision", "drop_path_kind", "ema")
DEFINING_OF = {"rlrr": ("rank", "init", "norm_affine", "patch_affine", "frozen_dtype"), "lora": ("lora_rank",)}


@dataclass(frozen=True)
class Column:
    """What runs must have in common to be averaged over tasks.

    Attributes:
        options: Name and value of each setting that defines the method, see :data:`DEFINING`.
    """

    model: str
    method: str
    protocol: str
    options: tuple[tuple[str, Any], ...]

    @property
    def changed(self) -> str:
        """The options that are not defaults, as text; empty if there are none."""
        return ", ".join(f"{name} {format_value(value)}" for name, value in self.options if value != DEFAULTS[name])


@dataclass(frozen=True)
class Result:
    """One tested run. Its ``settings`` are complete, and ``protocol`` in them is never empty."""

    folder: Path
    task: str
    seed: int
    accuracy: float
    settings: Mapping[str, Any]

    @property
    def column(self) -> Column:
        """The column of the run: runs in one column differ in task, seed and training settings."""
        settings, method = self.settings, self.settings["method"]
        names = [*DEFINING_OF.get(method, ()), *DEFINING]
        if settings["checkpoint"] is not None:
            names.remove("pretrained")  # has no effect then
        options = tuple((name, settings[name]) for name in names)
        return Column(settings["model"], method, settings["protocol"], options)


@dataclass(frozen=True)
class Cell:
    """Test accuracies of one task by seed. ``settings`` are those of the runs, except for seeds and machines."""

    accuracies: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) over seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Clash:
    """Runs of one column and task that are not seeds of one experiment. The user must choose among them.

    Attributes:
        runs: The runs, by seed.
        differ: Settings in which they differ; empty if they are equal and share a seed.
    """

    task: str
    runs: tuple[Result, ...]
    differ: tuple[str, ...]


@dataclass(frozen=True)
class Means:
    """Two kinds of means; the published figures in ``recipes.PUBLISHED`` are means over tasks.

    Attributes:
        over_tasks: Mean over tasks.
        of_groups: Mean of the groups' means; None if the benchmark has no groups.
        tasks: Number of tasks with a result.
        of_tasks: Number of tasks in the benchmark.
        groups: Mean of each group that has a task with a result.
    """

    over_tasks: float
    of_groups: float | None
    tasks: int
    of_tasks: int
    groups: Mapping[str, float]


def find_results(paths: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """Find tested runs.

    Args:
        paths: Run folders, sweep folders (only their final runs count), or folders that contain such folders.

    Returns:
        The tested runs, and a reason for each run or sweep that was left out.

    Raises:
        FileNotFoundError: If a path does not exist.
    """
    folders: dict[Path, Path] = {}
    reasons: dict[Path, str] = {}
    for path in paths:
        runs, others = _find_runs(path)
        folders |= {folder.resolve(): folder for folder in runs}
        reasons |= {folder.resolve(): reason for folder, reason in others.items()}
    results, left_out = [], list(reasons.values())
    for folder in folders.values():
        try:
            metrics = read_metrics(folder)
        except (OSError, ValueError) as error:
            left_out.append(str(error))
            continue
        accuracy = metrics.get("test_accuracy")
        if accuracy is None:
            why = metrics.get("error") or ("interrupted" if metrics.get("interrupted") else "no test accuracy")
            left_out.append(f"{folder}: {why}")
            continue
        settings = {**DEFAULTS, **metrics["settings"], "protocol": metrics["protocol"]}
        task = settings["task"] or settings["data"]
        results.append(Result(folder, task, settings["seed"], float(accuracy), settings))
    return results, left_out


def _find_runs(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """Run folders below a path, for sweeps the final ones; and why a sweep or the path has none."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.name in ("metrics.json", "sweep.json"):
        path = path.parent
    runs: list[Path] = []
    left_out: dict[Path, str] = {}
    for root, folders, files in os.walk(path):
        # hidden folders are temporary ones of killed processes
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "sweep.json" in files:
            folders.clear()
            try:
                runs += _final_runs(Path(root))
            except (OSError, ValueError) as error:
                left_out[Path(root)] = str(error)
        elif "metrics.json" in files:
            folders.clear()
            runs.append(Path(root))
    if not runs and not left_out:
        left_out[path] = f"{path}: no run in it: expected a metrics.json or a sweep.json at some depth"
    return runs, left_out


def _final_runs(folder: Path) -> list[Path]:
    path = folder / "sweep.json"
    try:
        names = [check_run_folder(run) for run in expect(read_json(path), "final", list)]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what a sweep writes: {error}") from error
    if not names:
        raise ValueError(f"{folder}: a sweep that has no final run yet; the same command again goes on with it")
    return [folder / name for name in names]


def cells(results: Iterable[Result]) -> tuple[dict[Column, dict[str, Cell]], list[Clash]]:
    """Group accuracies by column and task. Runs that clash are in no cell."""
    grouped: dict[tuple[Column, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        grouped.setdefault((result.column, result.task), []).append(result)
    found: dict[Column, dict[str, Cell]] = {}
    clashes = []
    for (column, task), runs in sorted(grouped.items(), key=lambda item: (_order(item[0][0]), item[0][1])):
        seeds, differ = tuple(run.seed for run in runs), _differing(runs)
        if differ or len(set(seeds)) < len(seeds):
            clashes.append(Clash(task, tuple(runs), differ))
        else:
            cell = Cell(tuple(run.accuracy for run in runs), seeds, runs[0].settings)
            found.setdefault(column, {})[task] = cell
    return found, clashes


def _order(column: Column) -> tuple[Any, ...]:
    """Sort key of columns: numbers, such as ranks, by value and other options by text."""
    options = tuple((value, "") if isinstance(value, (int, float)) else (0, str(value)) for _, value in column.options)
    return column.model, column.method, column.protocol, len(options), options


def _differing(runs: Sequence[Result]) -> tuple[str, ...]:
    """Settings that differ between runs, but not between seeds of one experiment."""
    names = {name for run in runs for name in run.settings} - MAY_DIFFER
    return tuple(sorted(n for n in names if any(run.settings.get(n) != runs[0].settings.get(n) for run in runs)))


def tasks_of(benchmark: str) -> dict[str, tuple[str, ...]]:
    """Tasks of ``vtab``, ``fgvc``, ... by group, in published order; one group ``""`` if there are no groups."""
    if benchmark == "vtab":
        return {group: tuple(f"vtab/{task}" for task in names) for group, names in VTAB_GROUPS.items()}
    names = tuple(task for task in TASKS if task.split("/")[0] == benchmark)
    return {"": names} if names else {}


def means(benchmark: str, cells: Mapping[str, Cell]) -> Means | None:
    """Average over the benchmark's tasks that have a result; None if there are none.

    Args:
        benchmark: ``vtab``, ``fgvc``, ...
        cells: Cells of one column by task (``vtab/cifar``).
    """
    groups = tasks_of(benchmark)
    found = {
        group: [cells[task].mean for task in names if task in cells]
        for group, names in groups.items()
        if any(task in cells for task in names)
    }
    if not found:
        return None
    by_group = {group: statistics.fmean(values) for group, values in found.items()}
    return Means(
        over_tasks=statistics.fmean(value for values in found.values() for value in values),
        of_groups=statistics.fmean(by_group.values()) if "" not in groups else None,
        tasks=sum(map(len, found.values())),
        of_tasks=sum(map(len, groups.values())),
        groups={} if "" in groups else by_group,
    )


def differing(benchmark: str, cells: Mapping[str, Cell]) -> dict[str, str]:
    """Settings that differ between the tasks of a mean: ``"recipe"`` if each task uses its recipe's, else ``"given"``.

    Args:
        benchmark: ``vtab``, ``fgvc``, ...
        cells: Cells of one column by task.
    """
    of_task = {task: cells[task].settings for names in tasks_of(benchmark).values() for task in names if task in cells}
    recipes = {task: recipe(task) for task in of_task}
    found = {}
    for name in sorted(DEFAULTS.keys() - MAY_DIFFER - {"task", "data"}):
        values = [settings[name] for settings in of_task.values()]
        if any(value != values[0] for value in values):
            follows = all(settings[name] == recipes[task].get(name) for task, settings in of_task.items())
            found[name] = "recipe" if follows else "given"
    return found


def benchmarks(columns: Mapping[Column, Mapping[str, Cell]]) -> list[str]:
    """The benchmarks that have a result, sorted; last ``""`` for other tasks."""
    tasks, known = {task for cells in columns.values() for task in cells}, set(TASKS)
    return sorted({task.split("/")[0] if task in known else "" for task in tasks}, key=lambda name: (name == "", name))
