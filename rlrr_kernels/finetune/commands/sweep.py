"""``rlrr-finetune sweep``: choose learning rate and weight decay on validation images, then test once."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands.common import (
    INTERRUPTED,
    Command,
    CommandError,
    add_settings,
    checking_input,
    console,
    given_settings,
    print_lines,
)
from rlrr_kernels.finetune.commands.sweep_folder import Plan, SweepFolder, published_grid
from rlrr_kernels.finetune.data import ImageSet, describe
from rlrr_kernels.finetune.distributed import World, choose_device, on_main, start
from rlrr_kernels.finetune.loop import load_data, prepare, train, with_absolute_paths
from rlrr_kernels.finetune.run_folder import METRICS, STATE
from rlrr_kernels.finetune.saved_run import check_data, check_settings, read_metrics, recorded_settings
from rlrr_kernels.finetune.settings import Settings, describe_settings, settings_from

#: Options that the sweep sets itself.
OWN = ("lr", "weight_decay", "drop_path", "seed", "protocol", "resume", "out")

DESCRIPTION = """\
Train on a grid of learning rates and weight decays, choose by validation accuracy (the
mean over seeds, each run at its best epoch), train the choice on the training and
validation images together, and test it once. The runs of the grid cannot read the test
images: they are handed a split that refuses.

    rlrr-finetune sweep --task vtab/cifar --data-root path/to/vtab-1k --seeds 0 1 2

The default grid is every value that the published recipes of the benchmark use. A run
whose loss is not finite counts as diverged. The sweep folder gets sweep.json and
sweep.md after each run. The same command again goes on after an interruption, and may
name more values: runs that are finished are kept. Options that are not listed as grids
are those of a run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    grids = parser.add_argument_group("grids")
    for flag, text in (
        ("--lrs", "learning rates (default: those of the published recipes)"),
        ("--weight-decays", "weight decays (default: those of the published recipes)"),
        ("--drop-paths", "stochastic depth rates (default: the recipe's, or 0)"),
    ):
        grids.add_argument(flag, type=float, nargs="+", metavar="X", help=text)
    grids.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    parser.add_argument("--out", type=Path, metavar="PATH", help="sweep folder (default: one under runs/, by its data)")
    parser.add_argument(
        "--final", action=argparse.BooleanOptionalAction, default=True, help="train and test the choice (default: on)"
    )
    add_settings(parser.add_argument_group("each run"), skip=OWN)


def run(arguments: argparse.Namespace) -> int:
    options = {name: value for name, value in given_settings(arguments).items() if name not in OWN}
    with checking_input():
        settings = settings_from({**options, "protocol": "choose-epoch"})
        base = with_absolute_paths(settings)
        lrs, decays = published_grid(base.task)
        plan = Plan.of(
            base,
            arguments.lrs or lrs,
            arguments.weight_decays or decays,
            arguments.drop_paths or [base.drop_path],
            arguments.seeds,
        )
        world = start(choose_device(base.device))
        folder = arguments.out or default_folder(settings)
        sweep = on_main(world, lambda: SweepFolder.open(folder, plan))
    print_lines(*describe_settings(options, skip=OWN), f"sweep in {folder}: {plan}")
    try:
        finished = search(sweep, world) and (not arguments.final or final_runs(sweep, world))
    except KeyboardInterrupt:
        finished = False
    if not finished:
        if world.main:
            print(f"interrupted; the same command goes on with {folder}", file=sys.stderr)
        return INTERRUPTED
    if world.main:
        for grid in sweep.grids():
            console().print(grid.rich(), "")
    print_lines(f"wrote {folder / 'sweep.json'} and {folder / 'sweep.md'}")
    return 0


def default_folder(settings: Settings) -> Path:
    """The folder for this data, model and method; the same each time, so that the sweep is found again."""
    dataset = (settings.task or settings.data).strip("/.").replace("/", "-")
    return Path("runs") / f"sweep-{dataset}-{settings.model}-{settings.variant}"


def search(sweep: SweepFolder, world: World) -> bool:
    """Train each point of the grid with each seed; returns False if interrupted."""
    plan = sweep.plan
    jobs = [(point, seed) for point in plan.points for seed in plan.seeds]
    for number, (point, seed) in enumerate(jobs, 1):
        print_lines(f"run {number} of {len(jobs)}: {point}, seed {seed}")
        settings = dataclasses.replace(plan.base, **vars(point), seed=seed)
        folder = sweep.folder / sweep.run_folder(point, seed, final=False)
        metrics = one_run(folder, settings, world, test=False, describe_data=number == 1)
        if metrics["interrupted"]:
            return False
        entry = on_main(world, partial(sweep.add_search, point, seed, metrics))
        if "error" not in entry:
            print_lines(f"validation accuracy {entry['val_accuracy']:.4f} at epoch {entry['epoch']}")
    return True


def final_runs(sweep: SweepFolder, world: World) -> bool:
    """Train the best point on train and val with each seed, and test it; returns False if interrupted."""
    point = on_main(world, sweep.best)
    if point is None:
        raise CommandError("every run of the grid diverged; try smaller --lrs")
    print_lines(f"chosen on validation images: {point}")
    for seed in sweep.plan.seeds:
        print_lines(f"final run: {point}, seed {seed}")
        # without validation images there is nothing to stop early by
        changes: dict[str, Any] = {**vars(point), "seed": seed, "protocol": "final", "early_stop": 0}
        settings = dataclasses.replace(sweep.plan.base, **changes)
        metrics = one_run(sweep.folder / sweep.run_folder(point, seed, final=True), settings, world, test=True)
        if metrics["interrupted"]:
            return False
        if "test_accuracy" not in metrics:
            raise CommandError(f"the final run diverged: {metrics['error']}")
        on_main(world, partial(sweep.add_final, point, seed, metrics))
    return True


class Sealed(ImageSet):
    """The test images during the search: they can be counted, but not read. Holds no reference to them."""

    def __init__(self, images: ImageSet) -> None:
        self.classes, self.count = images.classes, len(images)

    def __len__(self) -> int:
        return self.count

    def fixed(self, index: Any) -> Any:
        raise RuntimeError("a sweep's runs do not see test images")


def one_run(
    folder: Path, settings: Settings, world: World, *, test: bool, describe_data: bool = False
) -> Mapping[str, Any]:
    """Read the metrics of a finished run, resume an interrupted one, or train a new one.

    Args:
        folder: The run's folder.
        settings: Settings without ``out`` and ``resume``.
        world: This process.
        test: Whether the run may read the test images.
        describe_data: Whether to print what images were found.

    Returns:
        The contents of ``metrics.json``. ``error`` without ``best_epoch`` means that the loss became infinite or NaN.

    Raises:
        CommandError: If the folder holds a run with other settings, or data or model are missing.
    """
    with checking_input():
        metrics = on_main(world, lambda: earlier_metrics(folder, settings))
        if metrics is not None and metrics["finished"]:
            _check_data_again(metrics, settings)
    if metrics is not None and metrics["finished"]:
        print_lines(f"already done, in {folder}")
        return metrics
    place: dict[str, Any] = {"out": folder} if metrics is None else {"resume": folder}
    with checking_input():
        prepared = prepare(dataclasses.replace(settings, **place))
    if describe_data:
        print_lines(*describe(prepared.splits))
    if not test:
        splits = dataclasses.replace(prepared.splits, test=Sealed(prepared.splits.test))
        prepared = dataclasses.replace(prepared, splits=splits)
    try:
        return train(prepared, test=test)
    except FloatingPointError as error:
        # without the hint for a single run: other learning rates follow
        print_lines(f"diverged: {str(error).partition(';')[0]}")
        return {"interrupted": False, "error": f"{type(error).__name__}: {error}", "finished": True}


def earlier_metrics(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """Read the ``metrics.json`` of an earlier start of a run; None if the run must start anew.

    ``"finished"`` in it is also true for a run that diverged. The folder of a run that stopped before its first
    state was written is removed.

    Raises:
        ValueError: If the run has other settings, or its files are damaged.
    """
    if not folder.exists():
        return None
    metrics = read_metrics(folder) if (folder / METRICS).is_file() else {}
    if metrics:
        check_settings(metrics["settings"], settings, f"the run in {folder}")
    diverged = str(metrics.get("error", "")).startswith(FloatingPointError.__name__)
    if metrics.get("finished") or diverged:
        return metrics | {"finished": True}
    if (folder / STATE).is_file():
        return metrics | {"finished": False}
    shutil.rmtree(folder)
    return None


def _check_data_again(metrics: Mapping[str, Any], settings: Settings) -> None:
    """Check the images of a finished run if they may have been moved."""
    own, given = recorded_settings(metrics["settings"]), settings.to_dict()
    if any(own[name] != given[name] for name in ("data", "data_root")):
        check_data(metrics, settings, load_data(settings))


COMMAND = Command(
    "grid search over lr and weight decay, then one test", DESCRIPTION, add_arguments, run, multiprocess=True
)
