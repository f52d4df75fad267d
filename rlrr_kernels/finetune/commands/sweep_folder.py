"""The folder of a sweep: its grid, and its results in ``sweep.json`` and ``sweep.md``."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands.common import Grid, check_out
from rlrr_kernels.finetune.recipes import TASKS, recipe
from rlrr_kernels.finetune.saved_run import MAY_DIFFER, recorded_settings
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.checks import expect, inside, read_json
from rlrr_kernels.io.files import write_atomically

FORMAT = "rlrr_kernels.sweep/1"
#: Settings that differ between the runs of a sweep, or do not change results.
VARIED = frozenset({"lr", "weight_decay", "drop_path", "seed", "protocol"}) | MAY_DIFFER


#: Types of the results of a run of the grid, and of a run that was tested.
SEARCH_FIGURES: Mapping[str, type] = {"val_accuracy": float, "val_loss": float, "epoch": int}
FINAL_FIGURES: Mapping[str, type] = {"test_accuracy": float, "test_loss": float}


@dataclass(frozen=True)
class Point:
    """One point of the grid. The fields are those of :class:`Settings`."""

    lr: float
    weight_decay: float
    drop_path: float

    @property
    def label(self) -> str:
        """Name in folder names. It contains the ``repr`` of the numbers, so that each point has its own folder."""
        return f"lr{self.lr!r}-wd{self.weight_decay!r}-dp{self.drop_path!r}"

    def __str__(self) -> str:
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}, drop path {self.drop_path:g}"


@dataclass(frozen=True)
class Plan:
    """The grid, the seeds, and the settings that all runs share."""

    base: Settings
    points: tuple[Point, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(
        cls,
        base: Settings,
        lrs: Sequence[float],
        weight_decays: Sequence[float],
        drop_paths: Sequence[float],
        seeds: Sequence[int],
    ) -> Plan:
        """Combine all values; repeated values count once.

        Raises:
            ValueError: If a value is not valid for a run.
        """
        axes = (dict.fromkeys(axis) for axis in (lrs, weight_decays, drop_paths))
        points = tuple(Point(*values) for values in itertools.product(*axes))
        values = base.to_dict()
        for point in points:
            Settings.from_dict({**values, **vars(point)})
        for seed in seeds:
            Settings.from_dict({**values, "seed": seed})
        return cls(base, points, tuple(dict.fromkeys(seeds)))

    def __str__(self) -> str:
        named = ((self.points, "setting"), (self.seeds, "seed"))
        return ", ".join(f"{len(of)} {name}{'s' * (len(of) > 1)}" for of, name in named)


def _check_entry(entry: Any, figures: Mapping[str, type]) -> None:
    """Check one run of ``sweep.json``, which has these figures or (in the search) an error."""
    if type(entry) is not dict:
        raise ValueError(f"expected an object for each run, got {entry!r:.80}")
    for name in ("lr", "weight_decay", "drop_path"):
        expect(entry, name, float, least=0)
    expect(entry, "seed", int, least=0)
    check_run_folder(entry)
    if "error" in entry and figures is SEARCH_FIGURES:
        expect(entry, "error", str)
        return
    for name, kind in figures.items():
        expect(entry, name, kind, **({"least": 1} if kind is int else {}))


def check_run_folder(entry: Mapping[str, Any]) -> str:
    """Return the folder of a run in ``sweep.json``, relative to the sweep's.

    Raises:
        ValueError: If it is missing or outside of the sweep's folder.
    """
    folder: str = expect(entry, "folder", str)
    if not inside(folder):
        raise ValueError(f"folder: expected one in the sweep's, got {folder!r:.80}")
    return folder


def published_grid(task: str) -> tuple[list[float], list[float]]:
    """(learning rates, weight decays) in the recipes of the task's benchmark, or of VTAB-1k without a task."""
    benchmark = task.split("/")[0] or "vtab"
    recipes = [recipe(name) for name in TASKS if name.split("/")[0] == benchmark]
    lrs, decays = ({float(str(r[name])) for r in recipes} for name in ("lr", "weight_decay"))
    return sorted(lrs), sorted(decays)


@dataclass
class SweepFolder:
    """A sweep's folder. One process writes it; every result is on disk before the next run starts.

    Attributes:
        search: Results of the runs of the grid, by point and seed.
        final: Results of the runs that were tested, by point and seed.
    """

    folder: Path
    plan: Plan
    search: dict[tuple[Point, int], dict[str, Any]] = field(default_factory=dict)
    final: dict[tuple[Point, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, plan: Plan) -> SweepFolder:
        """Begin a sweep, or continue the one in the folder with its results.

        Results of values that are not in the plan are kept, but not chosen.

        Raises:
            FileExistsError: If the folder holds something else.
            OSError: If it cannot be written.
            ValueError: If it holds a sweep with other settings, or ``sweep.json`` is damaged.
        """
        path = folder / "sweep.json"
        sweep = cls(folder, plan)
        if path.is_file():
            try:
                known = read_json(path)
                if known.get("format") != FORMAT:
                    raise ValueError(f"expected format {FORMAT!r}, got {known.get('format')!r:.80}")
                theirs = _shared(recorded_settings(expect(known, "settings", dict)))
                for name, figures, kept in (
                    ("runs", SEARCH_FIGURES, sweep.search),
                    ("final", FINAL_FIGURES, sweep.final),
                ):
                    for entry in expect(known, name, list):
                        _check_entry(entry, figures)
                        kept[Point(entry["lr"], entry["weight_decay"], entry["drop_path"]), entry["seed"]] = entry
            except ValueError as error:
                raise ValueError(f"{path} is not what a sweep writes: {error}") from error
            ours = _shared(plan.base.to_dict())
            for name in sorted(theirs.keys() | ours.keys()):
                if theirs.get(name) != ours.get(name):
                    raise ValueError(
                        f"{name}: {folder} holds a sweep with {theirs.get(name)!r}, got {ours.get(name)!r}; "
                        f"{name}={theirs.get(name)!r} goes on with it, another --out begins a new one"
                    )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"out: {folder} exists, and is no sweep")
        check_out(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sweep.write()
        return sweep

    def run_folder(self, point: Point, seed: int, *, final: bool) -> Path:
        """The folder of a run, relative to the sweep's."""
        return Path("final" if final else "runs") / f"{point.label}-seed{seed}"

    def add_search(self, point: Point, seed: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Add and return the result of a run of the grid: its figures at the best epoch, or ``error``."""
        if "error" in metrics:
            figures = {"error": metrics["error"]}
        else:
            best = next(e for e in metrics["epochs"] if e["epoch"] == metrics["best_epoch"])
            figures = {name: best[name] for name in SEARCH_FIGURES}
        folder = self.run_folder(point, seed, final=False)
        self.search[point, seed] = {"folder": str(folder), **vars(point), "seed": seed, **figures}
        self.write()
        return self.search[point, seed]

    def add_final(self, point: Point, seed: int, metrics: Mapping[str, Any]) -> None:
        """Add the result of a run that was tested."""
        folder, figures = self.run_folder(point, seed, final=True), {name: metrics[name] for name in FINAL_FIGURES}
        self.final[point, seed] = {"folder": str(folder), **vars(point), "seed": seed, **figures}
        self.write()

    def score(self, point: Point) -> tuple[float, float] | None:
        """Mean validation accuracy and loss over seeds; None if a seed is missing or diverged."""
        found = [self.search.get((point, seed), {}) for seed in self.plan.seeds]
        if any("val_accuracy" not in entry for entry in found):
            return None
        return statistics.fmean(e["val_accuracy"] for e in found), statistics.fmean(e["val_loss"] for e in found)

    def best(self) -> Point | None:
        """The point of the highest accuracy, then the lowest loss, then the first. None if all diverged."""
        scores = {point: score for point in self.plan.points if (score := self.score(point)) is not None}
        return max(scores, key=lambda point: (scores[point][0], -scores[point][1]), default=None)

    def tests(self) -> list[dict[str, Any]]:
        """Results of the final runs of the best point. (A larger grid may have changed the choice.)"""
        best = self.best()
        return [self.final[best, seed] for seed in self.plan.seeds if best and (best, seed) in self.final]

    def write(self) -> None:
        """Write ``sweep.json`` and ``sweep.md``, each atomically."""
        plan, best = self.plan, self.best()
        values = {
            "format": FORMAT,
            "settings": _shared(plan.base.to_dict()),
            "grid": [vars(point) for point in plan.points],
            "seeds": list(plan.seeds),
            "runs": list(self.search.values()),
            "best": None if best is None else vars(best),
            "final": self.tests(),
        }
        write_atomically(self.folder / "sweep.json", (json.dumps(values, indent=2) + "\n").encode())
        text = "\n".join(grid.markdown() for grid in self.grids())
        write_atomically(self.folder / "sweep.md", text.encode())

    def grids(self) -> list[Grid]:
        """Tables of the results so far: the grid, and the test results of the choice."""
        return [self._search_grid(), self._final_grid()] if self.tests() else [self._search_grid()]

    def _search_grid(self) -> Grid:
        base, best = self.plan.base, self.best()
        header = ("lr", "weight decay", "drop path", "val accuracy, %", "val loss", "epoch", "")
        grid = Grid(f"{base.dataset}, {base.model}, {base.method}: validation", header, labels=0)
        for point in self.plan.points:
            entries = [self.search[point, seed] for seed in self.plan.seeds if (point, seed) in self.search]
            cells = ["", "", ""]
            if any("error" in entry for entry in entries):
                cells[0] = "diverged"
            elif entries:
                epochs = ", ".join(str(entry["epoch"]) for entry in entries)
                losses = statistics.fmean(entry["val_loss"] for entry in entries)
                cells = [_spread([entry["val_accuracy"] for entry in entries]), f"{losses:.4f}", epochs]
            left = len(self.plan.seeds) - len(entries)
            mark = "chosen" if point == best else f"{left} to run" if left else ""
            grid.add(f"{point.lr:g}", f"{point.weight_decay:g}", f"{point.drop_path:g}", *cells, mark)
        spread = "; mean ± standard deviation over seeds" if len(self.plan.seeds) > 1 else ""
        grid.notes.append(f"Each run at its best epoch{spread}.")
        return grid

    def _final_grid(self) -> Grid:
        grid = Grid("the choice, trained on train and val, tested once", ("seed", "test accuracy, %", "test loss"))
        entries = self.tests()
        for entry in entries:
            grid.add(str(entry["seed"]), f"{100 * entry['test_accuracy']:.2f}", f"{entry['test_loss']:.4f}")
        if len(entries) > 1:
            losses = statistics.fmean(entry["test_loss"] for entry in entries)
            grid.add("all", _spread([entry["test_accuracy"] for entry in entries]), f"{losses:.4f}")
        return grid


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all runs share."""
    return {name: value for name, value in settings.items() if name not in VARIED}


def _spread(accuracies: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(accuracies):.2f}"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else mean
