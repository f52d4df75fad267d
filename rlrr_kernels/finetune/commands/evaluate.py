"""``rlrr-finetune eval``: the accuracy of a run or an adapter, again or on other images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlrr_kernels.checkpoint.trained import printable
from rlrr_kernels.finetune.batches import Batches
from rlrr_kernels.finetune.commands.common import Command, checking_input, console, say
from rlrr_kernels.finetune.commands.grid import Grid
from rlrr_kernels.finetune.commands.options import add_settings, given
from rlrr_kernels.finetune.commands.runs import Run, add_run_argument, open_run
from rlrr_kernels.finetune.data import ImageSet, Splits, loading
from rlrr_kernels.finetune.distributed import World, choose_device
from rlrr_kernels.finetune.loop import load_data
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.finetune.state import check_data
from rlrr_kernels.finetune.trainer import AUTOCAST

SPLITS = ("test", "val", "train")
#: Settings that may differ from the run's: which images, where things are, and how to compute. Not the seed:
#: by it images are put aside for validation, and another one's were mostly trained on.
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


@dataclass(frozen=True)
class Evaluation:
    """Figures over a split.

    Attributes:
        loss: mean cross-entropy. accuracy: 0 to 1.
        hits, images: int64 ``[classes]``, right answers and images of each class of the data.
    """

    loss: float
    accuracy: float
    hits: Tensor
    images: Tensor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--split", choices=SPLITS, default="test", help="which images (default: test)")
    parser.add_argument("--per-class", action="store_true", help="the accuracy of each class as well")
    add_settings(parser.add_argument_group("in place of the run's"), only=OPTIONS)


def run(arguments: argparse.Namespace) -> int:
    options = given(arguments)
    with checking_input():
        opened = open_run(arguments.run, _as_one(options))
        settings = opened.settings
        if not opened.metrics and "data" not in options and "task" not in options:
            raise ValueError(f"data: expected --data or --task, as {arguments.run} is an adapter without a run")
        device = choose_device(settings.device)
        splits = load_data(settings)
        if opened.metrics and arguments.split != "test" and not {"data", "task"} & options.keys():
            # what validated a run must not have been trained on
            check_data(opened.metrics, settings, splits)
        labels = labels_of(opened, splits)
        images = split_of(splits, arguments.split)
        model = opened.model()
    result = evaluate(model.to(device), images, settings, device, labels)
    say(
        f"{settings.dataset}, {arguments.split}: accuracy {result.accuracy:.4f}, loss {result.loss:.4f}, "
        f"{len(images)} images"
    )
    for line in [*class_remarks(opened, splits, options), *remarks(opened, arguments.split, options, result)]:
        say(line)
    if arguments.per_class:
        grid = Grid("accuracy by class", ("class", "accuracy, %", "images"))
        names = opened.class_names or splits.class_names
        for number in labels.argsort().tolist():
            hits, count = int(result.hits[number]), int(result.images[number])
            name = printable(names[int(labels[number])])
            grid.add(name, f"{100 * hits / count:.1f}" if count else "-", str(count))
        console().print(grid.rich())
    return 0


def _as_one(options: Mapping[str, Any]) -> dict[str, Any]:
    """A dataset by name takes the place of a task, which would hide it."""
    return {**({"task": ""} if "data" in options and "task" not in options else {}), **options}


def labels_of(opened: Run, splits: Splits) -> Tensor:
    """The run's label of each class of the data, int64 ``[splits.classes]``.

    By name where both have names that tell classes apart; otherwise the same label, of as many classes.

    Raises:
        ValueError: the data has a class that the run does not know, or without names another number of classes.
    """
    dataset = opened.settings.dataset
    if not _by_name(opened, splits):
        if splits.classes != opened.classes:
            raise ValueError(f"data: {dataset} has {splits.classes} classes, the head {opened.classes}")
        return torch.arange(opened.classes)
    assert opened.class_names is not None
    known = {name: label for label, name in enumerate(opened.class_names)}
    unknown = [printable(name) for name in splits.class_names if name not in known]
    if unknown:
        raise ValueError(
            f"data: {dataset} has {len(unknown)} of {splits.classes} classes that the run does not know "
            f"({_first(unknown)}); expected some of its {opened.classes} ({_first(opened.class_names)})"
        )
    return torch.tensor([known[name] for name in splits.class_names])


def _by_name(opened: Run, splits: Splits) -> bool:
    """ImageNet has two classes "crane": names that are there twice tell no classes apart."""
    names = opened.class_names, splits.names
    return all(each is not None and len(set(each)) == len(each) for each in names)


def _first(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(map(printable, names[:count])) + (", ..." if len(names) > count else "")


def class_remarks(opened: Run, splits: Splits, options: Mapping[str, Any]) -> list[str]:
    """How the data's classes were matched to the run's, where that is not plain."""
    if _by_name(opened, splits):
        if splits.classes == opened.classes:
            return []
        return [
            f"{splits.classes} of the run's {opened.classes} classes are in the data ({_first(splits.class_names)}); "
            "an answer may be any of the run's"
        ]
    if not {"data", "task"} & options.keys() or (opened.class_names is None and splits.names is None):
        return []
    return ["classes are matched by their number: the run or the data has no names that tell them apart"]


def split_of(splits: Splits, split: str) -> ImageSet:
    """A split, seen through the test transform."""
    return ImageSet(getattr(splits, split).items, splits.test.transform, splits.classes)


@torch.no_grad()
def evaluate(
    model: nn.Module, images: ImageSet, settings: Settings, device: torch.device, labels: Tensor
) -> Evaluation:
    """Evaluate with the settings' batch size and precision, as training does.

    Args:
        model: on ``device``.
        images: float32 ``[C, H, W]`` and a label each.
        labels: what the model calls each label of ``images``, int64 ``[images.classes]``.
    """
    model.eval()
    dtype = AUTOCAST[settings.precision]
    loss = torch.zeros((), dtype=torch.float64)
    hits, count = torch.zeros(images.classes, dtype=torch.int64), torch.zeros(images.classes, dtype=torch.int64)
    keys = Batches(len(images), settings.batch_size, World())
    for inputs, classes in loading.batches(images, keys, device, settings.workers):
        targets = labels[classes]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            logits = model(inputs).float().cpu()
        loss += F.cross_entropy(logits, targets, reduction="sum")
        hits += torch.bincount(classes[logits.argmax(1) == targets], minlength=images.classes)
        count += torch.bincount(classes, minlength=images.classes)
    return Evaluation((loss / len(images)).item(), int(hits.sum()) / len(images), hits, count)


def remarks(opened: Run, split: str, options: Mapping[str, Any], result: Evaluation) -> list[str]:
    """What a reader must know to make sense of the figure."""
    metrics = opened.metrics
    if not metrics:
        return [] if split == "test" else ["whether it was trained on these images is not known without its run"]
    if {"data", "task"} & options.keys():
        return []
    if split == "test":
        lines = []
        if "test_accuracy" in metrics and not options.keys() - {"device", "workers", "data_root", "checkpoint"}:
            same = metrics["test_accuracy"] == result.accuracy
            lines.append(
                "the same accuracy as in metrics.json" if same else f"metrics.json: {metrics['test_accuracy']:.4f}"
            )
        return lines + ([metrics["protocol_note"]] if "protocol_note" in metrics else [])
    if split == "val" and metrics.get("protocol", "choose-epoch") == "choose-epoch":
        return ["the epoch was chosen on these images"]
    return [f"the {split} images were trained on"]


COMMAND = Command("evaluate a run or an adapter", DESCRIPTION, add_arguments, run)
