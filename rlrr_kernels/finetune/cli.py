"""``rlrr-finetune``: fine-tune an image classifier from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from rlrr_kernels.finetune.loop import prepare, train
from rlrr_kernels.finetune.settings import METHODS, PRECISIONS, Settings
from rlrr_kernels.linear import INITS

DESCRIPTION = """\
Fine-tune a timm vision transformer by RLRR, or by a linear probe or fully to compare.

With no arguments it fine-tunes the small transformer that ships with the package
on scikit-learn's handwritten digits: nothing is downloaded. The epoch is chosen on
the validation images; the test images are used once, at the end. A run folder gets
adapter.safetensors, metrics.json and curves.png.
"""

HELP = {
    "model": "timm model name",
    "pretrained": "load timm's weights for the model",
    "checkpoint": "load the model's weights from this file instead (.safetensors, .pth)",
    "data": "digits, fashion-mnist, a timm dataset name such as torch/cifar100 (with --data-root), or a folder with "
    "train/<class>/* and val or test",
    "data_root": "where a named dataset lies, or is downloaded to",
    "method": "what trains: u, v, f of each block linear and the head; the head; everything",
    "init": "start of u and v: as published, or the plain model's function",
    "epochs": "epochs, warm-up included",
    "warmup_epochs": "epochs of linear warm-up",
    "batch_size": "images a step",
    "lr": "peak learning rate",
    "warmup_lr": "first learning rate",
    "min_lr": "last learning rate",
    "weight_decay": "on u, v and the head's weight",
    "drop_path": "stochastic depth rate",
    "flip": "mirror training images at random",
    "precision": "fp32, or bf16 under autocast",
    "device": "auto, cpu, cuda, cuda:1, ...",
    "workers": "processes that load images",
    "seed": "of initial values, order and validation split",
    "out": "run folder, which must not exist (default: a new one under runs/)",
}
CHOICES = {"method": METHODS, "precision": PRECISIONS, "init": INITS}
PATHS = ("checkpoint", "data_root", "out")


def parser() -> argparse.ArgumentParser:
    """One option for each field of :class:`Settings`, with its default."""
    result = argparse.ArgumentParser(
        prog="rlrr-finetune", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(Settings):
        flag, text = "--" + field.name.replace("_", "-"), HELP[field.name]
        if isinstance(field.default, bool):
            state = "on" if field.default else "off"
            result.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=field.default, help=f"{text} (default: {state})"
            )
        elif field.name in PATHS:
            result.add_argument(flag, type=Path, metavar="PATH", help=text)
        else:
            result.add_argument(
                flag,
                type=type(field.default),
                default=field.default,
                choices=CHOICES.get(field.name),
                help=f"{text} (default: {field.default})",
            )
    return result


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run failed, 2 bad arguments, 130 stopped by Ctrl-C."""
    options = parser()
    arguments = options.parse_args(argv)
    try:
        prepared = prepare(Settings(**vars(arguments)))
    except (ValueError, TypeError, OSError) as error:
        options.exit(2, f"rlrr-finetune: error: {error}\n")
    try:
        metrics = train(prepared)
    except FileExistsError as error:
        options.exit(2, f"rlrr-finetune: error: {error}\n")
    except (FloatingPointError, OSError, RuntimeError) as error:
        options.exit(1, f"rlrr-finetune: error: {error}\n")
    folder = Path(metrics["run"])
    print(f"trained {metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters")
    if metrics["interrupted"]:
        print(f"interrupted after {len(metrics['epochs'])} epochs; what was reached is in {folder}", file=sys.stderr)
        return 130
    print(f"best epoch {metrics['best_epoch']}, test accuracy {metrics['test_accuracy']:.4f}")
    print(f"wrote {folder / 'adapter.safetensors'}, {folder / 'metrics.json'}, {folder / 'curves.png'}")
    return 0
