"""``rlrr-finetune``, or ``rlrr-finetune train``: one run."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands.common import INTERRUPTED, Command, CommandError, checking_input, say
from rlrr_kernels.finetune.commands.options import add_settings, describe_settings, given, settings_from
from rlrr_kernels.finetune.data import describe
from rlrr_kernels.finetune.distributed import launched
from rlrr_kernels.finetune.loop import prepare, train
from rlrr_kernels.finetune.state import MAY_DIFFER, read_state, resumed

DESCRIPTION = """\
Fine-tune a timm vision transformer by RLRR, or by a linear probe or fully to compare.

With no arguments it fine-tunes the small transformer that ships with the package
on scikit-learn's handwritten digits: nothing is downloaded. The epoch is chosen on
the validation images; the test images are used once, at the end.

With --task, everything that is not given comes from the published recipe of the task:

    rlrr-finetune --task vtab/cifar --data-root path/to/vtab-1k

A run folder gets adapter/ (what trained), metrics.json, curves.png, and state/, from
which --resume RUN goes on after an interruption; it takes the other options from the
run. Several GPUs or machines: torchrun -m rlrr_kernels.finetune, with the same options.
"""


def run(arguments: argparse.Namespace) -> int:
    options = given(arguments)
    with checking_input():
        if _continues(options):
            settings = resumed(options.pop("resume"), options)
        else:
            settings = settings_from(options)
            for line in describe_settings(options):
                say(line)
        prepared = prepare(settings)
        say(*describe(prepared.splits))
    try:
        metrics = train(prepared)
    except FileExistsError as error:
        raise CommandError(str(error), 2) from error
    return report(metrics)


def _continues(options: Mapping[str, Any]) -> bool:
    """Whether a run goes on: not where ``resume`` names an empty folder and other options say what to begin there.

    Raises:
        ValueError: it is empty, and nothing says what to train: the name may well be mistyped.
    """
    if "resume" not in options:
        return False
    if read_state(options["resume"]) is not None:
        return True
    if options.keys() <= MAY_DIFFER - {"data"}:
        raise ValueError(
            f"resume: expected the folder of an unfinished run, got {options['resume']}, which is empty; "
            "to begin a run there, give its options too (--task or --data, ...)"
        )
    return False


def report(metrics: Mapping[str, Any]) -> int:
    """Print what a run came to; returns its exit status."""
    folder = Path(metrics["run"])
    say(f"trained {metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters")
    if metrics["interrupted"]:
        if launched().main:
            print(
                f"interrupted after {len(metrics['epochs'])} epochs; what was reached is in {folder}, "
                f"and rlrr-finetune --resume {shlex.quote(str(folder))} goes on",
                file=sys.stderr,
            )
        return INTERRUPTED
    if "protocol_note" in metrics:
        say(metrics["protocol_note"])
    epoch = f"best epoch {metrics['best_epoch']}, " if metrics.get("protocol") != "final" else "last epoch, "
    say(f"{epoch}test accuracy {metrics['test_accuracy']:.4f}")
    say(f"wrote {folder / 'adapter'}, {folder / 'metrics.json'}, {folder / 'curves.png'}")
    return 0


COMMAND = Command("fine-tune; the command that runs if none is named", DESCRIPTION, add_settings, run, several=True)
