"""Passes checked in processes of their own, a few at a time, each under a time limit.

A kernel that hangs, or that makes the GPU refuse all later work, ends its own process and costs no other pass.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple, NoReturn

from rlrr_kernels.backends.verdicts import Where
from rlrr_kernels.check import worker

#: ``not here``: the backend, or the GPU that it is for; ``not tried``: the check itself could not be made.
Verdict = Literal["right", "wrong", "not here", "not tried"]

#: Signals that no kernel causes: somebody, or a system short of memory, ended the process.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SIGNALS = {number.value: number.name for number in signal.Signals}


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP raise SystemExit in this process, so that what it waits for is ended with it."""

    def leave(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, leave)


class Task(NamedTuple):
    """A pass of one of :data:`rlrr_kernels.backends.verdicts.SUBJECTS` on a device, ``cpu`` or ``cuda:0``."""

    subject: str
    which: str
    device: str

    def command(self) -> list[str]:
        """What checks it."""
        return [sys.executable, "-m", "rlrr_kernels.check.worker", *self]

    def environment(self) -> dict[str, str]:
        """Of that command: which CUDA kernels are used is read once a process."""
        return {**os.environ, "RLRR_CUDA_HOPPER": "1" if self.subject == "cuda-hopper" else "0"}


@dataclass(frozen=True)
class Outcome:
    """What became of a task. ``where`` is None if it ended before it began; ``worst``: the case of ``ratio``."""

    task: Task
    verdict: Verdict
    where: Where | None = None
    ratio: float | None = None
    worst: str = ""
    reason: str = ""


def _file() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")


def _read(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()


class _Running:
    def __init__(self, task: Task, seconds: float) -> None:
        self.task, self.seconds = task, seconds
        # files, not pipes: nobody reads while it runs
        self._out, self._err = (_file() for _ in range(2))
        self._process = subprocess.Popen(
            task.command(),
            env=task.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
        )
        self._deadline = time.monotonic() + seconds

    def outcome(self) -> Outcome | None:
        """None while it runs."""
        status = self._process.poll()
        if status is None and time.monotonic() < self._deadline:
            return None
        self.end()
        return understood(self.task, status, _read(self._out), _read(self._err), self.seconds)

    def end(self) -> None:
        """Kill it, if it runs, with all that it started."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # one that waits for a GPU that hangs may not even die
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)


def understood(task: Task, status: int | None, out: str, err: str, seconds: float) -> Outcome:
    """What a process's exit status (None: out of time after so many seconds) and output mean."""
    answers: list[dict[str, Any]] = []
    for line in out.splitlines():
        if line.startswith(worker.MARK):
            with contextlib.suppress(ValueError):  # a line that its process did not live to end
                answers.append(json.loads(line[len(worker.MARK) :]))
    where = Where(**answers[0]) if answers else None
    last = answers[-1] if answers else {}
    found = Outcome(task, **last, where=where) if "verdict" in last else None
    if found is not None and (status == 0 or found.verdict != "right"):
        return found
    lines = [line for line in err.splitlines() if line.strip()]
    said = worker.one_line(lines[-1] if lines else "")
    # kernels may compile for minutes, and a CPU be slow: only a GPU that does not come back from a launch hangs
    if status is None and ("launched" not in last or task.device == "cpu"):
        seen = last.get("done", last.get("launched", "none of its cases"))
        return Outcome(task, "not tried", where, reason=f"its {seconds:g} s were up, last seen at {seen}")
    if status is None:
        reason = f"no answer within {seconds:g} s from {last['launched']}"
    elif status < 0:
        reason = f"ended by {_SIGNALS.get(-status, f'signal {-status}')}: {said}"
    else:
        reason = f"exit status {status}: {said}"
    verdict: Verdict = "wrong" if where is not None and -(status or 0) not in _FROM_OUTSIDE else "not tried"
    return Outcome(task, verdict, where, reason=reason)


def run(tasks: Sequence[Task], seconds: float, at_once: int) -> Iterator[Outcome]:
    """Check each task, ``at_once`` of them at a time and ``seconds`` each at most; outcomes as they come.

    Closing it, or an interrupt, ends the processes that still run.
    """
    waiting, running = list(tasks), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(_Running(waiting.pop(0), seconds))
            for one in list(running):
                outcome = one.outcome()
                if outcome is not None:
                    running.remove(one)
                    yield outcome
            time.sleep(0.02)
    finally:
        for one in running:
            one.end()
