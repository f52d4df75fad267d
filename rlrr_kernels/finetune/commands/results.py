"""Finished runs on disk, and what they say together: a mean over seeds, over tasks, over groups."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands.options import FIELDS, shown
from rlrr_kernels.finetune.recipes import TASKS, VTAB_GROUPS, recipe
from rlrr_kernels.finetune.settings import check_types
from rlrr_kernels.io.reading import expect, inside, read_json

DEFAULTS: Mapping[str, Any] = {name: field.default for name, field in FIELDS.items()}

#: Settings in which runs that are averaged may differ: the seed, and what changes no result by design.
MAY_DIFFER = frozenset({"seed", "out", "resume", "data_root", "device", "workers", "cache", "tensorboard", "parallel"})

#: Settings that make a method what it is, whatever it is trained on; and those that only one method reads.
DEFINING = ("checkpoint", "pretrained", "head_init", "img_size", "precision", "drop_path_kind", "ema")
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
class Clash:
    """Runs of one column and task that are no seeds of one experiment: in no cell, as who made them must choose.

    Attributes:
        runs: by seed.
        differ: names of the settings in which they do; none where runs are alike and have one seed.
    """

    task: str
    runs: tuple[Result, ...]
    differ: tuple[str, ...]


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
        FileNotFoundError: a path that is not there.
    """
    folders: dict[Path, Path] = {}
    reasons: dict[Path, str] = {}
    for path in paths:
        runs, others = _look_below(path)
        folders |= {folder.resolve(): folder for folder in runs}
        reasons |= {folder.resolve(): reason for folder, reason in others.items()}
    results, left_out = [], list(reasons.values())
    for folder in folders.values():
        try:
            metrics = read_run(folder)
        except (OSError, ValueError) as error:
            left_out.append(str(error))
            continue
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


def _look_below(path: Path) -> tuple[list[Path], dict[Path, str]]:
    """(run folders, of sweeps the final ones; why nothing comes of a sweep, or of the path)."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.name in ("metrics.json", "sweep.json"):
        path = path.parent
    runs: list[Path] = []
    left_out: dict[Path, str] = {}
    for root, folders, files in os.walk(path):
        # a hidden folder is what a killed process was about to put in place
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
    """
    Raises:
        ValueError: there is none yet, or a broken ``sweep.json``.
    """
    path = folder / "sweep.json"
    try:
        names = [expect(run, "folder", str) for run in expect(read_json(path), "final", list)]
        for name in names:
            if not inside(name):
                raise ValueError(f"folder: expected one in the sweep's, got {name!r:.80}")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not what a sweep writes: {error}") from error
    if not names:
        raise ValueError(f"{folder}: a sweep that has no final run yet; the same command again goes on with it")
    return [folder / name for name in names]


def cells(results: Iterable[Result]) -> tuple[dict[Column, dict[str, Cell]], list[Clash]]:
    """Accuracies by column and task; and of which columns and tasks there is none, as their runs clash."""
    grouped: dict[tuple[Column, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: result.seed):
        grouped.setdefault((result.column, result.task), []).append(result)
    found: dict[Column, dict[str, Cell]] = {}
    clashes = []
    for (column, task), runs in sorted(grouped.items(), key=lambda item: (_place(item[0][0]), item[0][1])):
        seeds, differ = tuple(run.seed for run in runs), _differ(runs)
        if differ or len(set(seeds)) < len(seeds):
            clashes.append(Clash(task, tuple(runs), differ))
        else:
            cell = Cell(tuple(run.accuracy for run in runs), seeds, runs[0].settings)
            found.setdefault(column, {})[task] = cell
    return found, clashes


def _place(column: Column) -> tuple[Any, ...]:
    # by rank where only that differs, so as a number; values that have no order by what they look like
    options = tuple((value, "") if isinstance(value, (int, float)) else (0, str(value)) for _, value in column.options)
    return column.model, column.method, column.protocol, len(options), options


def _differ(runs: Sequence[Result]) -> tuple[str, ...]:
    """Settings in which runs differ, that seeds of one experiment have in common."""
    names = {name for run in runs for name in run.settings} - MAY_DIFFER
    return tuple(sorted(n for n in names if any(run.settings.get(n) != runs[0].settings.get(n) for run in runs)))


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
