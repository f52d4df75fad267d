"""``rlrr-finetune train``: train one run, new or resumed."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlrr_kernels.finetune.commands.common import (
    INTERRUPTED,
    Command,
    CommandError,
    add_settings,
    checking_input,
    given_settings,
    print_lines,
)
from rlrr_kernels.finetune.data import describe
from rlrr_kernels.finetune.distributed import launched
from rlrr_kernels.finetune.loop import prepare, train
from rlrr_kernels.finetune.saved_run import MAY_DIFFER, read_state, settings_to_resume
from rlrr_kernels.finetune.settings import describe_settings, settings_from

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
    options = given_settings(arguments)
    with checking_input():
        if _resumes(options):
            settings = settings_to_resume(options.pop("resume"), options)
        else:
            settings = settings_from(options)
            for line in describe_settings(options):
                print_lines(line)
        prepared = prepare(settings)
        print_lines(*describe(prepared.splits))
    try:
        metrics = train(prepared)
    except FileExistsError as error:
        raise CommandError(str(error), 2) from error
    return report(metrics)


def _resumes(options: Mapping[str, Any]) -> bool:
    """Whether a run is resumed. With other options, ``resume`` may name an empty folder, where a new run begins.

    Raises:
        ValueError: If the folder is empty and there are no such options: its name may be mistyped.
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
    """Print the results of a run; returns the exit status."""
    folder = Path(metrics["run"])
    print_lines(f"trained {metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters")
    if metrics["interrupted"]:
        if launched().main:
            print(
                f"interrupted after {len(metrics['epochs'])} epochs; what was reached is in {folder}, "
                f"and rlrr-finetune --resume {shlex.quote(str(folder))} goes on",
                file=sys.stderr,
            )
        return INTERRUPTED
    if "protocol_note" in metrics:
        print_lines(metrics["protocol_note"])
    epoch = f"best epoch {metrics['best_epoch']}, " if metrics["protocol"] != "final" else "last epoch, "
    print_lines(f"{epoch}test accuracy {metrics['test_accuracy']:.4f}")
    print_lines(f"wrote {folder / 'adapter'}, {folder / 'metrics.json'}, {folder / 'curves.png'}")
    return 0


COMMAND = Command(
    "fine-tune; the command that runs if none is named", DESCRIPTION, add_settings, run, multiprocess=True
)
