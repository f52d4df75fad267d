"""Finished runs on disk, and what they say together: a mean over seeds, over tasks, over groups."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrr_kernels.checkpoint.reading import expect, inside, read_json
from rlrr_kernels.finetune.commands.options import FIELDS, shown
from rlrr_kernels.finetune.recipes import TASKS, VTAB_GROUPS, recipe
from rlrr_kernels.finetune.settings import check_types

DEFAULTS: Mapping[str, Any] = {name: field.default for name, field in FIELDS.items()}

#: Settings in which runs that are averaged may differ: the seed, and what changes no result by design.
MAY_DIFFER = frozenset({"seed", "out", "resume", "data_root", "device", "workers", "tensorboard", "parallel"})

#: Settings that make a method what it is, whatever it is trained on; and those that only one method reads.
DEFINING = ("checkpoint", "pretrained", "img_size", "precision", "ema")
DEFINING_OF = {"rlrr": ("init", "norm_affine", "patch_affine", "frozen_dtype"), "lora": ("lora_rank",)}


@dataclass(frozen=True)
class Result:
    """One run that was tested. Its ``settings`` are complete; ``protocol`` in them is never empty."""

    folder: Path
    task: str
    seed: int
    accuracy: float
    settings: Mapping[str, Any]

    @property
    def column(self) -> Column:
        """Runs in one column are of one method, and differ by task, by seed and in how they were trained."""
        settings, method = self.settings, self.settings["method"]
        names = [*DEFINING_OF.get(method, ()), *DEFINING]
        if settings["checkpoint"] is not None:
            names.remove("pretrained")  # it has no effect then
        options = tuple((name, settings[name]) for name in names)
        return Column(settings["model"], method, settings["protocol"], options)


@dataclass(frozen=True)
class Column:
    """What accuracies must have in common to be averaged over tasks.

    Attributes:
        options: name and value of each setting that defines the method, see :data:`DEFINING`.
    """

    model: str
    method: str
    protocol: str
    options: tuple[tuple[str, Any], ...]

    @property
    def changed(self) -> str:
        """What of the method is not the default, for a reader; empty for nothing."""
        return ", ".join(f"{name} {shown(value)}" for name, value in self.options if value != DEFAULTS[name])


@dataclass(frozen=True)
class Cell:
    """Test accuracies of one task, a seed each.

    Attributes:
        settings: of the runs; seeds, folders and machines are one run's.
    """

    accuracies: tuple[float, ...]
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1) over seeds; None for one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Means:
    """Two summaries that are easily confused; the figures in ``recipes.PUBLISHED`` are means over tasks.

    Attributes:
        over_tasks: every task counts the same.
        of_groups: every group counts the same (None where the benchmark has no groups).
        tasks, of_tasks: how many tasks were there, and are in the benchmark.
        groups: mean of each group that has a task.
    """

    over_tasks: float
    of_groups: float | None
    tasks: int
    of_tasks: int
    groups: Mapping[str, float]


#: What is read of a run's ``metrics.json``, and of which types. A run that diverged lacks some, and older ones others.
_READ: Mapping[str, tuple[type, ...]] = {
    "test_accuracy": (float,),
    "classes": (int,),
    "data_fingerprint": (str,),
    "protocol": (str,),
    "task": (str, type(None)),
    "protocol_note": (str,),
    "error": (str,),
    "interrupted": (bool,),
    "finished": (bool,),
    "epochs": (list,),
}


def read_run(folder: Path) -> dict[str, Any]:
    """The ``metrics.json`` of a run folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what a run writes.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no metrics.json")
    try:
        metrics = read_json(path)
        settings = expect(metrics, "settings", dict)
        check_types(settings)
        for name in ("model", "seed"):
            expect(settings, name, type(DEFAULTS[name]))
        for name, kinds in _READ.items():
            if name in metrics:
                expect(metrics, name, *kinds)
        if not 0 <= metrics.get("test_accuracy", 0) <= 1:
            raise ValueError(f"test_accuracy: expected 0 to 1, got {metrics['test_accuracy']}")
    except ValueError as error:
        raise ValueError(f"{path} is not what a run writes: {error}") from error
    return metrics


def find_results(paths: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """Tested runs in ``paths``, and a reason for each run or sweep that was left out.

    Args:
        paths: run folders, sweep folders (their final runs count, not those they chose
            from), or folders that hold such folders at any depth.

    Raises:
        FileNotFoundError: a path that is not there, or under which there is no run.
        ValueError: a path that is a sweep without a final run, or a broken ``metrics.json`` or ``sweep.json``.
    """
    folders: dict[Path, Path] = {}
    unfinished: dict[Path, str] = {}
    for path in paths:
        runs, sweeps = _look_below(path)
        if not runs and not sweeps:
            raise FileNotFoundError(f"no run in {path}: expected a metrics.json or a sweep.json at some depth")
        folders |= {folder.resolve(): folder for folder in runs}
        unfinished |= {
            folder.resolve(): f"{folder}: a sweep that has no final run yet; the same command again goes on with it"
            for folder in sweeps
        }
        named = path.parent if path.name == "sweep.json" else path
        if named in sweeps:
            raise ValueError(unfinished[named.resolve()])
    results, left_out = [], list(unfinished.values())
    for folder in folders.values():
        metrics = read_run(folder)
        accuracy = metrics.get("test_accuracy")
        if accuracy is None:
            why = metrics.get("error") or ("interrupted" if metrics.get("interrupted") else "no test accuracy")
            left_out.append(f"{folder}: {why}")
            continue
        settings = {**DEFAULTS, **metrics["settings"]}
        # runs of before there were protocols chose the epoch on validation images
        settings["protocol"] = metrics.get("protocol") or settings.get("protocol") or "choose-epoch"
        task = metrics.get("task") or settings.get("task") or str(settings.get("data"))
        results.append(Result(folder, task, settings["seed"], float(accuracy), settings))
    return results, left_out


def _look_below(path: Path) -> tuple[list[Path], list[Path]]:
    """(run folders, of sweeps the final ones; sweeps that have none)."""
    if path.name in ("metrics.json", "sweep.json"):
        path = path.parent
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    runs, unfinished = [], []
    for root, folders, files in os.walk(path):
        # a hidden folder is what a killed process was about to put in place
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "sweep.json" in files:
            folders.clear()
            final = _final_runs(Path(root))
            runs += final
            unfinished += [] if final else [Path(root)]
        elif "metrics.json" in files:
            folders.clear()
            runs.append(Path(root))
    return runs, unfinished


def _final_runs(folder: Path) -> list[Path]:
    path = folder / "sweep.json"
    try:
        names = [expect(run, "folder", str) for run in expect(read_json(path), "final", list)]
        for name in names:
            if not inside(name):
                raise ValueError(f"folder: expected one in the sweep's, got {name!r:.80}")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what a sweep writes: {error}") from error
    return [folder / name for name in names]


def cells(results: Iterable[Result]) -> dict[Column, dict[str, Cell]]:
    """Accuracies by column and task.

    Raises:
        ValueError: two runs of a cell have one seed, or differ in more than the seed.
    """
    grouped: dict[Column, dict[str, list[Result]]] = {}
    for result in results:
        grouped.setdefault(result.column, {}).setdefault(result.task, []).append(result)
    for tasks in grouped.values():
        for runs in tasks.values():
            _check_seeds(runs)
    return {
        column: {
            task: Cell(tuple(run.accuracy for run in runs), tuple(run.seed for run in runs), runs[0].settings)
            for task, runs in tasks.items()
        }
        for column, tasks in sorted(grouped.items(), key=lambda item: _place(item[0]))
    }


def _place(column: Column) -> tuple[Any, ...]:
    # by rank where only that differs, so as a number; values that have no order by what they look like
    options = tuple((value, "") if isinstance(value, (int, float)) else (0, str(value)) for _, value in column.options)
    return column.model, column.method, column.protocol, len(options), options


def _check_seeds(runs: list[Result]) -> None:
    runs.sort(key=lambda run: run.seed)
    first = runs[0]
    for run in runs[1:]:
        names = (first.settings.keys() | run.settings.keys()) - MAY_DIFFER
        differ = sorted(name for name in names if first.settings.get(name) != run.settings.get(name))
        if differ:
            raise ValueError(
                f"{first.folder} and {run.folder} are runs of {run.task} that differ in {', '.join(differ)}: "
                "no seeds of one experiment; name the folders that belong together"
            )
    for one, next_one in itertools.pairwise(runs):
        if one.seed == next_one.seed:
            raise ValueError(f"{one.folder} and {next_one.folder} are runs of {one.task} with one seed, {one.seed}")


def tasks_of(benchmark: str) -> dict[str, tuple[str, ...]]:
    """Tasks of ``vtab``, ``fgvc``, ... by group, in the order in which they are published; one group ``""`` where
    the benchmark has none."""
    if benchmark == "vtab":
        return {group: tuple(f"vtab/{task}" for task in names) for group, names in VTAB_GROUPS.items()}
    names = tuple(task for task in TASKS if task.split("/")[0] == benchmark)
    return {"": names} if names else {}


def means(benchmark: str, accuracy: Mapping[str, float]) -> Means | None:
    """Both means over those tasks of the benchmark that are there; None where none is.

    Args:
        benchmark: ``vtab``, ``fgvc``, ...
        accuracy: task (``vtab/cifar``) -> accuracy, already averaged over seeds.
    """
    groups = tasks_of(benchmark)
    found = {
        group: [accuracy[task] for task in names if task in accuracy]
        for group, names in groups.items()
        if any(task in accuracy for task in names)
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
    """Settings in which the tasks of a mean differ: ``"recipe"`` if each task has its recipe's, else ``"given"``.

    Args:
        benchmark: ``vtab``, ``fgvc``, ...
        cells: of one column, by task; those of other benchmarks are not looked at.
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


def benchmarks(tasks: Sequence[str]) -> list[str]:
    """The benchmarks that the tasks are of, in order; tasks of none are under ``""``."""
    known = set(TASKS)
    return sorted({task.split("/")[0] if task in known else "" for task in tasks}, key=lambda name: (name == "", name))
