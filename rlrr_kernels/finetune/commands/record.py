"""What a sweep is to do and has done: ``sweep.json`` and ``sweep.md`` in its folder."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlrr_kernels.checkpoint import write_atomically
from rlrr_kernels.finetune import state
from rlrr_kernels.finetune.commands.grid import Grid
from rlrr_kernels.finetune.commands.results import read_run
from rlrr_kernels.finetune.recipes import TASKS, recipe
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.files import check_writable
from rlrr_kernels.io.reading import expect, inside, read_json

FORMAT = "rlrr_kernels.sweep/1"
#: Settings that differ between the runs of a sweep, or that no result depends on.
VARIED = frozenset({"lr", "weight_decay", "drop_path", "seed", "protocol", "data_root"}) | state.MAY_DIFFER


@dataclass(frozen=True)
class Point:
    """One setting of the grid; its fields are those of :class:`Settings`."""

    lr: float
    weight_decay: float
    drop_path: float

    @property
    def label(self) -> str:
        """For folder names; ``repr`` of the numbers, so that no two settings share a folder."""
        return f"lr{self.lr!r}-wd{self.weight_decay!r}-dp{self.drop_path!r}"

    def __str__(self) -> str:
        return f"lr {self.lr:g}, weight decay {self.weight_decay:g}, drop path {self.drop_path:g}"


@dataclass(frozen=True)
class Plan:
    """The grid and the seeds, and what all runs have in common."""

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
        """Every combination, a value that is given twice once.

        Raises:
            ValueError: a value that no run could have.
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


def _point(entry: Mapping[str, Any]) -> Point:
    return Point(entry["lr"], entry["weight_decay"], entry["drop_path"])


def _check_entry(entry: Any, tested: bool) -> None:
    if type(entry) is not dict:
        raise ValueError(f"expected an object for each run, got {entry!r:.80}")
    for name in ("lr", "weight_decay", "drop_path"):
        expect(entry, name, float, least=0)
    expect(entry, "seed", int, least=0)
    if not inside(expect(entry, "folder", str)):
        raise ValueError(f"folder: expected one in the sweep's, got {entry['folder']!r:.80}")
    if "error" in entry and not tested:
        expect(entry, "error", str)
        return
    for name in ("test_accuracy", "test_loss") if tested else ("val_accuracy", "val_loss"):
        expect(entry, name, float)
    if not tested:
        expect(entry, "epoch", int, least=1)


def published_grid(task: str) -> tuple[list[float], list[float]]:
    """(learning rates, weight decays) that the recipes of the task's benchmark use; VTAB-1k's without a task."""
    benchmark = task.split("/")[0] or "vtab"
    recipes = [recipe(name) for name in TASKS if name.split("/")[0] == benchmark]
    lrs, decays = ({float(str(r[name])) for r in recipes} for name in ("lr", "weight_decay"))
    return sorted(lrs), sorted(decays)


@dataclass
class Record:
    """A sweep's folder. Written by one process; every change is on disk before the next run starts.

    Attributes:
        search: (point, seed) -> what a run of the grid came to.
        final: (point, seed) -> the same for the run that was tested.
    """

    folder: Path
    plan: Plan
    search: dict[tuple[Point, int], dict[str, Any]] = field(default_factory=dict)
    final: dict[tuple[Point, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, plan: Plan) -> Record:
        """A new sweep, or the one that the folder holds, with the results it has.

        Values that are not in the plan keep their results, and are not chosen from.

        Raises:
            FileExistsError: the folder holds something else.
            OSError: it cannot be written.
            ValueError: a sweep of other runs than the plan's, or a broken ``sweep.json``.
        """
        path = folder / "sweep.json"
        record = cls(folder, plan)
        if path.is_file():
            try:
                known = read_json(path)
                if known.get("format") != FORMAT:
                    raise ValueError(f"expected format {FORMAT!r}, got {known.get('format')!r:.80}")
                theirs = {k: v for k, v in state.recorded(expect(known, "settings", dict)).items() if k not in VARIED}
                for name, kept in (("runs", record.search), ("final", record.final)):
                    for entry in expect(known, name, list):
                        _check_entry(entry, tested=name == "final")
                        kept[_point(entry), entry["seed"]] = entry
            except ValueError as error:
                raise ValueError(f"{path} is not what a sweep writes: {error}") from error
            ours = record.common()
            for name in sorted(theirs.keys() | ours.keys()):
                if theirs.get(name) != ours.get(name):
                    raise ValueError(
                        f"{name}: {folder} holds a sweep with {theirs.get(name)!r}, got {ours.get(name)!r}; "
                        f"{name}={theirs.get(name)!r} goes on with it, another --out begins a new one"
                    )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"out: {folder} exists, and is no sweep")
        try:
            check_writable(folder)
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"out: {error.strerror}") from error
        record.write()
        return record

    def common(self) -> dict[str, Any]:
        """The settings that all runs share."""
        return {name: value for name, value in self.plan.base.to_dict().items() if name not in VARIED}

    def search_folder(self, point: Point, seed: int) -> Path:
        """Of a run of the grid, relative to the sweep's."""
        return Path("runs") / f"{point.label}-seed{seed}"

    def final_folder(self, point: Point, seed: int) -> Path:
        """Of a run that is tested, relative to the sweep's."""
        return Path("final") / f"{point.label}-seed{seed}"

    def searched(self, point: Point, seed: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Keep and return what a run of the grid came to: ``val_accuracy``, ``val_loss``, ``epoch``, or ``error``."""
        entry = {"folder": str(self.search_folder(point, seed)), **vars(point), "seed": seed}
        if "error" in metrics:
            entry["error"] = metrics["error"]
        else:
            best = next(e for e in metrics["epochs"] if e["epoch"] == metrics["best_epoch"])
            entry |= {name: best[name] for name in ("epoch", "val_accuracy", "val_loss")}
        self.search[point, seed] = entry
        self.write()
        return entry

    def tested(self, point: Point, seed: int, metrics: Mapping[str, Any]) -> None:
        """Keep what a final run came to."""
        entry = {"folder": str(self.final_folder(point, seed)), **vars(point), "seed": seed}
        self.final[point, seed] = entry | {name: metrics[name] for name in ("test_accuracy", "test_loss")}
        self.write()

    def score(self, point: Point) -> tuple[float, float] | None:
        """(mean validation accuracy, mean validation loss) over seeds; None if a seed is missing or diverged."""
        found = [self.search.get((point, seed), {}) for seed in self.plan.seeds]
        if any("val_accuracy" not in entry for entry in found):
            return None
        return statistics.fmean(e["val_accuracy"] for e in found), statistics.fmean(e["val_loss"] for e in found)

    def best(self) -> Point | None:
        """The highest accuracy; of equals the lowest loss, then the first of the grid. None if all diverged."""
        scores = {point: score for point in self.plan.points if (score := self.score(point)) is not None}
        return max(scores, key=lambda point: (scores[point][0], -scores[point][1]), default=None)

    def tests(self) -> list[dict[str, Any]]:
        """Final runs of the best setting. (More values may have changed the choice since an earlier one.)"""
        best = self.best()
        return [self.final[best, seed] for seed in self.plan.seeds if best and (best, seed) in self.final]

    def write(self) -> None:
        """Write ``sweep.json`` and ``sweep.md``, each whole."""
        plan, best = self.plan, self.best()
        values = {
            "format": FORMAT,
            "settings": self.common(),
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
        """The results so far: the grid, and what the choice came to on the test images."""
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


def _spread(accuracies: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(accuracies):.2f}"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else mean


def left_behind(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """The ``metrics.json`` of an earlier start of a run, or None where the run must start anew.

    ``"finished"`` in it says whether there is nothing left to train; a run that diverged counts as
    finished. A folder of a run that stopped before its first epoch ended holds nothing to go on
    from, and is removed.

    Raises:
        ValueError: it has other settings, or its files are broken.
    """
    if not folder.exists():
        return None
    metrics = read_run(folder) if (folder / "metrics.json").is_file() else {}
    if metrics:
        wanted, found = settings.to_dict(), state.recorded(metrics["settings"])
        for name in wanted.keys() - state.MAY_DIFFER:
            if found.get(name) != wanted[name]:
                raise ValueError(f"{name}: {folder} holds a run with {found.get(name)!r}, got {wanted[name]!r}")
    diverged = str(metrics.get("error", "")).startswith(FloatingPointError.__name__)
    if metrics.get("finished") or diverged:
        return metrics | {"finished": True}
    if (folder / state.FILE).is_file():
        return metrics | {"finished": False}
    shutil.rmtree(folder)
    return None
