"""The command and its table, and :func:`failures` for programs."""

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
from rlrr_kernels.check.processes import Outcome, Task, exit_on_signals, run
from rlrr_kernels.io import cache

DESCRIPTION = """\
Compute every pass of every backend at the shapes that matter, in a process each, and hold it
to float64. What is found is kept: backends that failed here are not chosen any more.
"""

#: Seconds that one process may take: most of them compile kernels for a GPU first.
SECONDS = 180.0

_COLUMNS = "{:<12} {:<12} {:>6}  {:<9}  {}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes; checked by :func:`main`."""
    parser.add_argument("--device", default=None, help="cpu, cuda or cuda:INDEX (default: the GPU, else the CPU)")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help=f"of {', '.join(SUBJECTS)}; may be repeated (default: all)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="that each process may take (default: %(default)g)"
    )


def main(arguments: argparse.Namespace) -> int:
    """Exit status: 0 all is right, 1 something is wrong, or nothing could be checked, 2 bad arguments, 130 Ctrl-C.

    SIGTERM and SIGHUP end it with its processes, as Ctrl-C does; 128 and their number is the status then.
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
        for outcome in run(tasks, arguments.seconds, _at_once(device)):
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
    """Backends that failed on a device, and others that could not be checked -> why; what was not yet checked is now.

    What is found is kept.

    Raises:
        OSError: it cannot be kept.
    """
    tasks = [task for task in _tasks(device, None) if task.which not in verdicts.found(task.subject, device)]
    path = _place()
    outcomes = list(run(tasks, seconds, _at_once(device)))
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
    """The device that an option names, by default the GPU, else the CPU. Raises ValueError if it is not here."""
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
    """Processes on a GPU mostly compile, each on one core; on a CPU one uses all cores."""
    return min(4, os.cpu_count() or 1) if device.type == "cuda" else 1


def _row(outcome: Outcome) -> str:
    ratio = "-" if outcome.ratio is None else f"{outcome.ratio:.2f}"
    words = f"at {outcome.worst}" if outcome.verdict == "right" else outcome.reason
    which = "-" if outcome.verdict == "not here" else outcome.task.which
    return _COLUMNS.format(outcome.task.subject, which, ratio, outcome.verdict, words)


def _place() -> Path:
    """Where findings are kept. Raises OSError where they cannot be: before minutes of checking, not after."""
    path = verdicts.default_file()
    if path is None:
        raise OSError("there is no home folder; name a file by RLRR_CHECKED_FILE")
    cache.check_writable(path, verdicts.FORMAT)
    return path


def _keep(path: Path, outcomes: Iterable[Outcome]) -> bool:
    """Add what was found to the record; whether anything was."""
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
