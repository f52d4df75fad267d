"""Commands in processes of their own, which end in time and with all that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rlrr_kernels.check.processes import exit_on_signals as exit_on_signals

#: Exit status of what was ended because its time was up, as of ``timeout``.
TIME_OUT = 124
#: Seconds that a process has to end by itself what it started, before all of its group is killed.
GRACE = 3.0


@dataclass
class Running:
    """A command in a process group of its own.

    Attributes:
        command: what runs. seconds: after how many it is ended.
        log: a file for its output, standard error included; None: where this process writes.
        environment: of the process; None: this one's.
        status: its exit status once it has one; :data:`TIME_OUT` where it was ended.
        took: seconds.
    """

    command: Sequence[str]
    seconds: float
    log: Path | None = None
    environment: Mapping[str, str] | None = None
    status: int | None = None
    took: float = 0.0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _began: float = 0.0

    def start(self) -> None:
        """Begin; its time starts here."""
        self._began = time.monotonic()
        out: IO[bytes] | None = None if self.log is None else self.log.open("ab")
        with out or contextlib.nullcontext():
            self._process = subprocess.Popen(
                self.command,
                env=self.environment,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=None if out is None else subprocess.STDOUT,
            )

    def wait(self) -> int:
        """Its exit status, within its time and the grace."""
        assert self._process is not None
        try:
            self.status = self._process.wait(max(0.0, self._began + self.seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.status = TIME_OUT
        self.took = time.monotonic() - self._began
        self.end()
        return self.status

    def end(self) -> None:
        """End the process and its group, those that it left behind included."""
        end([self])


def end(running: Iterable[Running]) -> None:
    """End processes and their groups, those that they left behind included; one time of grace serves all."""
    started = [one._process for one in running if one._process is not None]
    alive = [process for process in started if process.poll() is None]
    left = [pid for process in alive for pid in _descendants(process.pid)]  # some may be in groups of their own
    for process in alive:
        _signal(os.killpg, process.pid, signal.SIGTERM)
    _wait(alive)
    for process in started:
        _signal(os.killpg, process.pid, signal.SIGKILL)
    for pid in left:
        _signal(os.kill, pid, signal.SIGKILL)
    _wait(alive)


def _wait(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or the grace is over: one that a driver holds cannot be waited for."""
    over = time.monotonic() + GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, over - time.monotonic()))


def _signal(send: Callable[[int, int], None], to: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(to, number)


def _descendants(pid: int) -> list[int]:
    """Processes that a process has started, those of these included, by Linux's /proc; none elsewhere."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, ()))
    for one in found:
        found += children.get(one, ())
    return found


@contextlib.contextmanager
def ended(running: Mapping[str, Running]) -> Iterator[None]:
    """Whatever ends the block, these end with it, and so do those added in it."""
    try:
        yield
    finally:
        end(running.values())


def run(command: Sequence[str], seconds: float) -> int:
    """Run a command and return its exit status, :data:`TIME_OUT` where it was ended after ``seconds``."""
    running = Running(command, seconds)
    with ended({"": running}):
        running.start()
        return running.wait()
