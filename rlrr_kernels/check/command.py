"""The command ``check`` and its table; :func:`failures` is for programs."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from rlrr_kernels._version import __version__
from rlrr_kernels.backends import verdicts
from rlrr_kernels.backends.verdicts import SUBJECTS, Finding
from rlrr_kernels.check.processes import Outcome, Task, exit_on_signals, run_tasks
from rlrr_kernels.io import cache

DESCRIPTION = """\
Compute every pass of every backend at the shapes that matter, in a process each, and hold it
to float64. What is found is kept: backends that failed here are not chosen any more.
"""

#: Seconds that one process may take, including compiling for a GPU.
SECONDS = 180.0

_COLUMNS = "{:<12} {:<12} {:>6}  {:<9}  {}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options; :func:`main` checks their values."""
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:INDEX (default: the GPU, else the CPU)")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help=f"of {', '.join(SUBJECTS)}; may be repeated (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="that each process may take (default: %(default)g)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the command. SIGTERM and SIGHUP end it with its processes, as Ctrl-C does.

    Returns:
        The exit status: 0 if all is right; 1 if something is wrong, or nothing could be checked; 2 for bad arguments;
        130 after Ctrl-C; 128 and its number after another signal.
    """
    try:
        device = device_of(arguments.device)
        tasks = _tasks(device, arguments.backend)
        if not arguments.seconds > 0:
            raise ValueError(f"--seconds: expected more than 0, got {arguments.seconds:g}")
    except ValueError as error:
        print(f"rlrr_kernels check: error: {error}", file=sys.stderr)
        return 2
    exit_on_signals()
    path = None
    try:
        path = _place()
    except OSError as error:
        print(f"rlrr_kernels check: what is found will not be kept: {error}", file=sys.stderr)
    print(f"rlrr_kernels {__version__}, torch {torch.__version__}, on {device}; error: the largest, by what it may be")
    print(_COLUMNS.format("backend", "pass", "error", "verdict", ""), flush=True)
    outcomes, absent, interrupted = list[Outcome](), set[str](), 0
    try:
        for outcome in run_tasks(tasks, arguments.seconds, _at_once(device)):
            outcomes.append(outcome)
            if outcome.verdict != "not here" or outcome.task.subject not in absent:
                print(_row(outcome), flush=True)
            if outcome.verdict == "not here":
                absent.add(outcome.task.subject)
    except KeyboardInterrupt:
        interrupted = 130
    except SystemExit as signalled:
        interrupted = int(signalled.code or 0)
    try:
        if path is not None and _keep(path, outcomes):
            print(f"kept in {path}")
    except OSError as error:
        print(f"rlrr_kernels check: not kept: {error}", file=sys.stderr)
    if interrupted:
        print("rlrr_kernels check: interrupted", file=sys.stderr)
        return interrupted
    verdicts = {outcome.verdict for outcome in outcomes}
    return 0 if "right" in verdicts and verdicts <= {"right", "not here"} else 1


def failures(device: torch.device, seconds: float = SECONDS) -> tuple[dict[str, str], dict[str, str]]:
    """Check what was not yet checked on a device, keep the findings, and return which backends are wrong.

    Returns:
        Two dicts from backend to reason: those that failed, and others that could not be checked.

    Raises:
        OSError: If the findings cannot be kept.
    """
    tasks = [task for task in _tasks(device, None) if task.which not in verdicts.found(task.subject, device)]
    path = _place()
    outcomes = list(run_tasks(tasks, seconds, _at_once(device)))
    _keep(path, outcomes)
    wrong, untried = (
        {o.task.subject: f"{o.task.which}: {o.reason}" for o in outcomes if o.verdict == verdict}
        for verdict in ("wrong", "not tried")
    )
    for subject, (_, passes) in SUBJECTS.items():
        why = verdicts.failure(subject, device, passes)
        if why is not None:
            wrong[subject] = why
    return wrong, {subject: why for subject, why in untried.items() if subject not in wrong}


def device_of(name: str | None) -> torch.device:
    """Return the device that an option names; by default the GPU, else the CPU.

    Raises:
        ValueError: If there is no such device.
    """
    if name is None:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (colon and not index.isdecimal())):
        raise ValueError(f"--device: expected cpu, cuda or cuda:INDEX, got {name!r}")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"--device: expected one of the {count} CUDA devices that torch sees, got {name!r}")
    return torch.device(f"cuda:{int(index or 0)}" if kind == "cuda" else "cpu")


def _tasks(device: torch.device, names: Sequence[str] | None) -> list[Task]:
    for name in names or ():
        if name not in SUBJECTS:
            raise ValueError(f"--backend: expected one of {', '.join(SUBJECTS)}, got {name!r}")
        if SUBJECTS[name][0] != device.type:
            raise ValueError(f"--backend: {name} does not run on {device}")
    return [
        Task(subject, which, str(device))
        for subject, (kind, passes) in SUBJECTS.items()
        if kind == device.type and (not names or subject in names)
        for which in passes
    ]


def _at_once(device: torch.device) -> int:
    """Return how many processes to run: on a GPU each mostly compiles on one core; on a CPU one uses all cores."""
    return min(4, os.cpu_count() or 1) if device.type == "cuda" else 1


def _row(outcome: Outcome) -> str:
    ratio = "-" if outcome.ratio is None else f"{outcome.ratio:.2f}"
    words = f"at {outcome.worst}" if outcome.verdict == "right" else outcome.reason
    which = "-" if outcome.verdict == "not here" else outcome.task.which
    return _COLUMNS.format(outcome.task.subject, which, ratio, outcome.verdict, words)


def _place() -> Path:
    """Return the file for the findings.

    Raises:
        OSError: If it cannot be written: before minutes of checking, not after.
    """
    path = verdicts.default_file()
    if path is None:
        raise OSError("there is no home folder; name a file by RLRR_CHECKED_FILE")
    cache.check_writable(path, verdicts.FORMAT)
    return path


def _keep(path: Path, outcomes: Iterable[Outcome]) -> bool:
    """Keep what was found, and return whether there was anything to keep."""
    today = datetime.date.today().isoformat()
    findings = [
        Finding(o.where, o.task.which, o.verdict == "right", o.ratio, o.reason, today)
        for o in outcomes
        if o.where is not None and o.verdict in ("right", "wrong")
    ]
    if findings:
        verdicts.add(path, findings)
        verdicts.kept.cache_clear()
    return bool(findings)
