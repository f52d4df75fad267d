"""Commands in processes of their own under a time limit, and the checks of single passes as such commands.

A kernel that hangs, or that makes the GPU refuse all later work, ends its own process and affects no other pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, NoReturn

from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.check import worker

#: Exit status of a process that was ended at its time limit, as the command ``timeout`` has it.
TIME_OUT = 124
#: Seconds that a process has to end its own children after SIGTERM, before its whole group is killed.
GRACE = 3.0


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP raise SystemExit in this process, so that it ends its children before it exits."""

    def leave(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, leave)


class Process:
    """A command that runs in a process group of its own; it is started when the object is made.

    Args:
        command: The program and its arguments.
        limit: Seconds after which it is ended.
        environment: Its environment variables; None: those of this process.
        stdout: Where its output goes; None: to the output of this process.
        stderr: The same for standard error.

    Attributes:
        status: The exit status, :data:`TIME_OUT` after its time limit, or None while it runs.
        seconds: How long it ran.
    """

    def __init__(
        self,
        command: Sequence[str],
        limit: float,
        environment: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | int | None = None,
    ) -> None:
        self.limit = limit
        self.status: int | None = None
        self.seconds = 0.0
        self._began = time.monotonic()
        self.popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        """Return the exit status, or None while it runs; end it with its children when its time is up."""
        if self.status is None:
            self.seconds = time.monotonic() - self._began
            self.status = self.popen.poll()
            if self.status is None and self.seconds >= self.limit:
                self.status = TIME_OUT
            if self.status is not None:
                end([self])
        return self.status

    def wait(self) -> int:
        """Return the exit status when it has ended or its time is up."""
        while (status := self.poll()) is None:
            time.sleep(0.02)
        return status


def end(processes: Collection[Process]) -> None:
    """End processes with their groups and children; one time of grace serves all of them."""
    alive = [process.popen for process in processes if process.popen.poll() is None]
    children = [pid for popen in alive for pid in _descendants(popen.pid)]  # some may be in groups of their own
    for popen in alive:
        _signal(os.killpg, popen.pid, signal.SIGTERM)
    _wait(alive)
    for process in processes:
        _signal(os.killpg, process.popen.pid, signal.SIGKILL)
    for pid in children:
        _signal(os.kill, pid, signal.SIGKILL)
    _wait(alive)


def _wait(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Wait until all have ended, or until the grace is over: a process that a driver holds may never end."""
    deadline = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _signal(send: Callable[[int, int], None], to: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(to, number)


def _descendants(pid: int) -> list[int]:
    """Return the children of a process and their children, as Linux's /proc lists them; none on other systems."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, ()))
    for child in found:
        found += children.get(child, ())
    return found


def run_command(command: Sequence[str], limit: float) -> int:
    """Run a command and return its exit status, or :data:`TIME_OUT` if it was ended after ``limit`` seconds."""
    process = Process(command, limit)
    try:
        return process.wait()
    finally:
        end([process])


#: ``not here``: the backend or its GPU is missing. ``not tried``: the check itself could not be made.
Verdict = Literal["right", "wrong", "not here", "not tried"]

#: Signals that no kernel causes: somebody, or a system short of memory, ended the process.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SIGNAL_NAMES = {number.value: number.name for number in signal.Signals}


class Task(NamedTuple):
    """One pass of one of :data:`rlrr_kernels.backends.verdicts.SUBJECTS` on a device, ``cpu`` or ``cuda:0``."""

    subject: str
    which: str
    device: str

    def command(self) -> list[str]:
        """Return the command that checks it."""
        return [sys.executable, "-m", "rlrr_kernels.check.worker", *self]

    def environment(self) -> dict[str, str]:
        """Return the environment of that command: a process reads once which CUDA kernels it uses."""
        return {**os.environ, "RLRR_CUDA_HOPPER": "1" if self.subject == "cuda-hopper" else "0"}


@dataclass(frozen=True)
class Outcome:
    """The result of a task.

    Attributes:
        where: What the result holds for; None if the process ended before it could tell.
        ratio: The largest error divided by the allowed error.
        worst: The case that has it.
        reason: What is wrong, in one line.
    """

    task: Task
    verdict: Verdict
    where: Where | None = None
    ratio: float | None = None
    worst: str = ""
    reason: str = ""


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")


def _content(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


class _Worker:
    """The process of a task; its output goes to files, as nobody reads a pipe while it runs."""

    def __init__(self, task: Task, limit: float) -> None:
        self.task = task
        self._out, self._err = _file(), _file()
        self.process = Process(task.command(), limit, task.environment(), self._out, self._err)

    def outcome(self) -> Outcome | None:
        """Return the outcome, or None while it runs."""
        status = self.process.poll()
        if status is None:
            return None
        return outcome_of(self.task, status, _content(self._out), _content(self._err), self.process.limit)


def outcome_of(task: Task, status: int, out: str, err: str, limit: float) -> Outcome:
    """Return what the exit status of a worker, its output and its standard error mean."""
    answers: list[dict[str, Any]] = []
    for line in out.splitlines():
        if line.startswith(worker.MARK):
            with contextlib.suppress(ValueError):  # the process may die within a line
                answers.append(json.loads(line[len(worker.MARK) :]))
    where = Where(**answers[0]) if answers else None
    last = answers[-1] if answers else {}
    found = Outcome(task, **last, where=where) if "verdict" in last else None
    if found is not None and (status == 0 or found.verdict != "right"):
        return found
    lines = [line for line in err.splitlines() if line.strip()]
    message = worker.one_line(lines[-1] if lines else "")
    # compiling may take minutes, and a CPU may be slow: only a GPU that does not come back from a launch hangs
    if status == TIME_OUT and ("launched" not in last or task.device == "cpu"):
        seen = last.get("done", last.get("launched", "none of its cases"))
        return Outcome(task, "not tried", where, reason=f"its {limit:g} s were up, last seen at {seen}")
    if status == TIME_OUT:
        reason = f"no answer within {limit:g} s from {last['launched']}"
    elif status < 0:
        reason = f"ended by {_SIGNAL_NAMES.get(-status, f'signal {-status}')}: {message}"
    else:
        reason = f"exit status {status}: {message}"
    verdict: Verdict = "wrong" if where is not None and -status not in _FROM_OUTSIDE else "not tried"
    return Outcome(task, verdict, where, reason=reason)


def run_tasks(tasks: Sequence[Task], limit: float, at_once: int) -> Iterator[Outcome]:
    """Check each task, ``at_once`` of them at a time and ``limit`` seconds each, and yield outcomes as they come.

    An interrupt, or closing the generator, ends the processes that still run.
    """
    waiting, running = list(tasks), list[_Worker]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Worker(waiting.pop(0), limit))
            for one in list(running):
                outcome = one.outcome()
                if outcome is not None:
                    running.remove(one)
                    yield outcome
            time.sleep(0.02)
    finally:
        end([one.process for one in running])
