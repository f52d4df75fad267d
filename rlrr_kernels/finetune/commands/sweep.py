"""``rlrr-finetune sweep``: choose learning rate and weight decay on validation images, then test once."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands.common import INTERRUPTED, Command, CommandError, checking_input, console, say
from rlrr_kernels.finetune.commands.options import add_settings, describe_settings, given, settings_from
from rlrr_kernels.finetune.commands.record import Plan, Record, left_behind, published_grid
from rlrr_kernels.finetune.data import ImageSet, describe
from rlrr_kernels.finetune.distributed import World, choose_device, launched, on_main, start
from rlrr_kernels.finetune.loop import load_data, located, prepare, train
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.state import check_data, recorded

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
    options = {name: value for name, value in given(arguments).items() if name not in OWN}
    with checking_input():
        told = settings_from({**options, "protocol": "choose-epoch"})
        base = located(told)
        lrs, decays = published_grid(base.task)
        plan = Plan.of(
            base,
            arguments.lrs or lrs,
            arguments.weight_decays or decays,
            arguments.drop_paths or [base.drop_path],
            arguments.seeds,
        )
        world = start(choose_device(base.device))
        folder = arguments.out or default_folder(told)
        record = on_main(world, lambda: Record.open(folder, plan))
    say(*describe_settings(options, skip=OWN), f"sweep in {folder}: {plan}")
    try:
        finished = search(record, world) and (not arguments.final or final(record, world))
    except KeyboardInterrupt:
        finished = False
    if not finished:
        if launched().main:
            print(f"interrupted; the same command goes on with {folder}", file=sys.stderr)
        return INTERRUPTED
    if launched().main:
        for grid in record.grids():
            console().print(grid.rich(), "")
    say(f"wrote {folder / 'sweep.json'} and {folder / 'sweep.md'}")
    return 0


def default_folder(settings: Settings) -> Path:
    """Always the same for the same data, model and method: that is how a sweep is found again."""
    dataset = (settings.task or settings.data).strip("/.").replace("/", "-")
    return Path("runs") / f"sweep-{dataset}-{settings.model}-{settings.method}"


def search(record: Record, world: World) -> bool:
    """Train every setting and seed of the grid; False if it was interrupted."""
    plan = record.plan
    jobs = [(point, seed) for point in plan.points for seed in plan.seeds]
    for number, (point, seed) in enumerate(jobs, 1):
        say(f"run {number} of {len(jobs)}: {point}, seed {seed}")
        settings = dataclasses.replace(plan.base, **vars(point), seed=seed)
        metrics = one_run(
            record.folder / record.search_folder(point, seed), settings, world, test=False, tell=number == 1
        )
        if metrics["interrupted"]:
            return False
        entry = on_main(world, partial(record.searched, point, seed, metrics))
        if "error" not in entry:
            say(f"validation accuracy {entry['val_accuracy']:.4f} at epoch {entry['epoch']}")
    return True


def final(record: Record, world: World) -> bool:
    """Train the best setting on train and val, once a seed, and test it; False if it was interrupted."""
    point = on_main(world, record.best)
    if point is None:
        raise CommandError("every run of the grid diverged; try smaller --lrs")
    say(f"chosen on validation images: {point}")
    for seed in record.plan.seeds:
        say(f"final run: {point}, seed {seed}")
        # there are no validation images left to stop early by
        common = {**vars(point), "seed": seed, "protocol": "final", "early_stop": 0}
        settings = dataclasses.replace(record.plan.base, **common)
        metrics = one_run(record.folder / record.final_folder(point, seed), settings, world, test=True)
        if metrics["interrupted"]:
            return False
        if "test_accuracy" not in metrics:
            raise CommandError(f"the final run diverged: {metrics['error']}")
        on_main(world, partial(record.tested, point, seed, metrics))
    return True


class Sealed(ImageSet):
    """The test images during a search: they can be counted, and not seen."""

    def __init__(self, images: ImageSet) -> None:
        # nothing of the images is kept, so nothing that reads around these methods finds any
        self.classes, self.count = images.classes, len(images)

    def __len__(self) -> int:
        return self.count

    def fixed(self, index: Any) -> Any:
        raise RuntimeError("a sweep's runs do not see test images")


def one_run(folder: Path, settings: Settings, world: World, *, test: bool, tell: bool = False) -> Mapping[str, Any]:
    """The metrics of a run: read if it is finished, resumed if it was interrupted, trained otherwise.

    Args:
        folder: of the run.
        settings: without ``out`` and ``resume``.
        test: whether it may see the test images.
        tell: say what images there are.

    Returns:
        ``metrics.json``. With ``error`` and no ``best_epoch`` the loss was not finite.

    Raises:
        ValueError: the folder holds a run with other settings.
        CommandError: data or model cannot be had.
    """
    with checking_input():
        metrics = on_main(world, lambda: left_behind(folder, settings))
        if metrics is not None and metrics["finished"]:
            _check_moved(metrics, settings)
    if metrics is not None and metrics["finished"]:
        say(f"already done, in {folder}")
        return metrics
    place: dict[str, Any] = {"out": folder} if metrics is None else {"resume": folder}
    with checking_input():
        prepared = prepare(dataclasses.replace(settings, **place))
    if tell:
        say(*describe(prepared.splits))
    if not test:
        splits = dataclasses.replace(prepared.splits, test=Sealed(prepared.splits.test))
        prepared = dataclasses.replace(prepared, splits=splits)
    try:
        return train(prepared, test=test)
    except FloatingPointError as error:
        # the hint is for a single run: here other rates follow
        say(f"diverged: {str(error).partition(';')[0]}")
        return {"interrupted": False, "error": f"{type(error).__name__}: {error}", "finished": True}


def _check_moved(metrics: Mapping[str, Any], settings: Settings) -> None:
    """``ValueError`` unless a finished run was trained on the images of the settings, which may lie elsewhere now."""
    own, given = recorded(metrics["settings"]), settings.to_dict()
    moved = any(own[name] != given[name] for name in ("data", "data_root"))
    if moved or "data_fingerprint" not in metrics:
        check_data(metrics, settings, load_data(settings))


COMMAND = Command("grid search over lr and weight decay, then one test", DESCRIPTION, add_arguments, run, several=True)
