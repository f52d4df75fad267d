"""``rlrr-finetune eval``: evaluate a run or an adapter, on its own images or others."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from rlrr_kernels.finetune.commands.common import (
    Command,
    Grid,
    add_run_argument,
    add_settings,
    checking_input,
    console,
    given_settings,
    print_lines,
)
from rlrr_kernels.finetune.data import ImageSet, Splits
from rlrr_kernels.finetune.distributed import World, choose_device
from rlrr_kernels.finetune.evaluation import Evaluation, evaluate
from rlrr_kernels.finetune.loop import load_data
from rlrr_kernels.finetune.saved_run import SavedRun, check_data, open_run
from rlrr_kernels.io.checks import sanitize

SPLITS = ("test", "val", "train")
#: Settings that may replace the run's: which images, where files are, and how to compute. Not the seed, which decides
#: the validation images: those of another seed were mostly trained on.
OPTIONS = (
    "model", "checkpoint", "img_size", "task", "data", "data_root", "resize", "batch_size", "precision", "device",
    "workers",
)  # fmt: skip

DESCRIPTION = """\
Evaluate a run, or an adapter of one: accuracy and loss, by default on the test images
of its own data, where they are the figures in its metrics.json. The model and the data
come from the run; an adapter without a run needs --data or --task, and --model only if
it does not name its own.

Images are seen as in testing, also those of --split train. Classes are matched by name
where both the run and the data have names for them; the data may have some of them only.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="which images (default: test)")
    parser.add_argument("--per-class", action="store_true", help="the accuracy of each class as well")
    add_settings(parser.add_argument_group("in place of the run's"), only=OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    options = given_settings(arguments)
    other_data = bool({"data", "task"} & options.keys())
    if "data" in options:
        # the run's task would take precedence
        options = {"task": "", **options}
    with checking_input():
        saved = open_run(arguments.run, options)
        settings = saved.settings
        if not saved.metrics and not other_data:
            raise ValueError(f"data: expected --data or --task, as {arguments.run} is an adapter without a run")
        device = choose_device(settings.device)
        splits = load_data(settings)
        if saved.metrics and arguments.split != "test" and not other_data:
            # otherwise images that the run was trained on could count as validation images
            check_data(saved.metrics, settings, splits)
        labels = labels_of(saved, splits)
        images = split_of(splits, arguments.split)
        model = saved.model()
    result = evaluate(model.to(device), images, settings, device, World(), labels)
    print_lines(
        f"{settings.dataset}, {arguments.split}: accuracy {result.accuracy:.4f}, loss {result.loss:.4f}, "
        f"{len(images)} images",
        *class_remarks(saved, splits, other_data),
        *([] if saved.metrics and other_data else remarks(saved, arguments.split, options.keys(), result)),
    )
    if arguments.per_class:
        grid = Grid("accuracy by class", ("class", "accuracy, %", "images"))
        names = saved.class_names or splits.class_names
        for number in labels.argsort().tolist():
            hits, count = int(result.hits[number]), int(result.images[number])
            name = sanitize(names[int(labels[number])])
            grid.add(name, f"{100 * hits / count:.1f}" if count else "-", str(count))
        console().print(grid.rich())
    return 0


def split_of(splits: Splits, split: str) -> ImageSet:
    """A split, seen through the test transform."""
    return ImageSet(getattr(splits, split).items, splits.test.transform, splits.classes)


def labels_of(saved: SavedRun, splits: Splits) -> Tensor:
    """The run's label of each class of the data, int64 ``[splits.classes]``.

    Classes are matched by name if both sides have unique names, otherwise by label.

    Raises:
        ValueError: If the data has a class that the run does not know, or (without names) another number of classes.
    """
    dataset = saved.settings.dataset
    if not _by_name(saved, splits):
        if splits.classes != saved.classes:
            raise ValueError(f"data: {dataset} has {splits.classes} classes, the head {saved.classes}")
        return torch.arange(saved.classes)
    assert saved.class_names is not None
    known = {name: label for label, name in enumerate(saved.class_names)}
    unknown = [sanitize(name) for name in splits.class_names if name not in known]
    if unknown:
        raise ValueError(
            f"data: {dataset} has {len(unknown)} of {splits.classes} classes that the run does not know "
            f"({_first(unknown)}); expected some of its {saved.classes} ({_first(saved.class_names)})"
        )
    return torch.tensor([known[name] for name in splits.class_names])


def _by_name(saved: SavedRun, splits: Splits) -> bool:
    """Whether both sides have unique class names. (ImageNet has two classes named "crane".)"""
    names = saved.class_names, splits.names
    return all(each is not None and len(set(each)) == len(each) for each in names)


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(sanitize, names[:count])) + (", ..." if len(names) > count else "")


def class_remarks(saved: SavedRun, splits: Splits, other_data: bool) -> list[str]:
    """Lines about how the data's classes were matched to the run's, if that is not obvious."""
    if _by_name(saved, splits):
        if splits.classes == saved.classes:
            return []
        return [
            f"{splits.classes} of the run's {saved.classes} classes are in the data ({_first(splits.class_names)}); "
            "an answer may be any of the run's"
        ]
    if not other_data or (saved.class_names is None and splits.names is None):
        return []
    return ["classes are matched by their number: the run or the data has no names that tell them apart"]


def remarks(saved: SavedRun, split: str, options: Collection[str], result: Evaluation) -> list[str]:
    """Lines that a reader needs to interpret the result.

    Args:
        saved: The run, evaluated on its own data.
        split: The split.
        options: Names of the settings that the user gave.
        result: The result.
    """
    metrics = saved.metrics
    if not metrics:
        return [] if split == "test" else ["whether it was trained on these images is not known without its run"]
    if split == "test":
        lines = []
        if "test_accuracy" in metrics and not set(options) - {"device", "workers", "data_root", "checkpoint"}:
            same = metrics["test_accuracy"] == result.accuracy
            lines.append(
                "the same accuracy as in metrics.json" if same else f"metrics.json: {metrics['test_accuracy']:.4f}"
            )
        return lines + ([metrics["protocol_note"]] if "protocol_note" in metrics else [])
    if split == "val" and metrics["protocol"] == "choose-epoch":
        return ["the epoch was chosen on these images"]
    return [f"the {split} images were trained on"]


COMMAND = Command("evaluate a run or an adapter", DESCRIPTION, add_arguments, run)
