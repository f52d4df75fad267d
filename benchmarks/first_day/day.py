"""One call of the first day: its clock, its folder, the processes of its stages, and the table that ends it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import processes

ROOT = Path(__file__).parents[2]
PRETENDED_GPU = ROOT / "tests" / "pretended_gpu"
#: Seconds kept back for the end of a call, and the fewest with which a piece is worth starting.
RESERVE, LEAST = 8.0, 15.0


@dataclass(frozen=True)
class Piece:
    """A command to run: ``name`` is its row's and its log's, ``seconds`` the most it may take."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """What became of a piece.

    Attributes:
        name: the piece's. status: its exit status; :data:`processes.TIME_OUT` where it was ended; None: not begun.
        seconds: it took. log: all that it said, none where it did not begin.
    """

    name: str
    status: int | None
    seconds: float
    log: Path

    @property
    def lines(self) -> list[str]:
        """What it said, without empty lines."""
        if not self.log.exists():
            return []
        return [line.rstrip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]

    @property
    def last(self) -> str:
        return self.lines[-1].strip() if self.lines else ""

    def outcome(self) -> str:
        """In a few words, with its last line where it did not end well."""
        if self.status is None:
            return "not started: no time left"
        took = f"after {self.seconds:.0f} s"
        if self.status == processes.TIME_OUT:
            return f"TIME OUT {took}: {self.last}"
        if self.status < 0:
            return f"DIED of signal {-self.status} {took}: {self.last}"
        return f"ok {took}" if self.status == 0 else f"FAILED with status {self.status} {took}: {self.last}"


@dataclass
class Day:
    """What the stages of one call share.

    Attributes:
        out: folder for logs, raw results and the table.
        limit: seconds after which everything has ended. jobs: processes at once where they only compile or test.
        rehearse: on a pretended GPU, with tiny shapes.
        environment: of every piece.
        failed: whether a piece failed, or said that something is wrong.
    """

    out: Path
    limit: float
    jobs: int
    rehearse: bool
    environment: dict[str, str] = field(init=False)
    failed: bool = False
    _began: float = field(default_factory=time.monotonic)
    _rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.environment = _environment(self.rehearse)
        if self.rehearse:  # what is found of a pretended GPU is not kept for real ones
            self.environment["RLRR_CHECKED_FILE"] = str(self.out / "checked.json")

    @property
    def left(self) -> float:
        """Seconds that a piece begun now may take."""
        return self._began + self.limit - time.monotonic() - RESERVE

    def row(self, name: str, text: str = "") -> None:
        """Add a line to the table, on disk at once."""
        self._rows.append(f"{name:<26} {text}"[:170].rstrip())
        (self.out / "table.txt").write_text(self.table())
        print(self._rows[-1], flush=True)

    def note(self, done: Done, text: str = "") -> None:
        """A row for a piece that ended well; :meth:`run` has written one for each other."""
        if done.status == 0:
            self.row(done.name, text)

    def rows(self, lines: Sequence[str]) -> None:
        """Lines below the last row, as they are."""
        for line in lines:
            self.row(f"  {line}")

    def table(self) -> str:
        return "".join(f"{row}\n" for row in self._rows)

    def run(self, *pieces: Piece) -> list[Done]:
        """Run pieces side by side; a row for each that does not end well."""
        done: dict[str, Done] = {}
        started: dict[str, processes.Running] = {}
        with processes.ended(started):
            for piece in pieces:
                log = self.out / f"{piece.name}.log"
                log.unlink(missing_ok=True)
                if self.left < LEAST:
                    done[piece.name] = Done(piece.name, None, 0.0, log)
                    continue
                environment = {**self.environment, **piece.environment}
                running = processes.Running(piece.command, min(piece.seconds, self.left), log, environment)
                running.start()
                started[piece.name] = running
            for name, running in started.items():
                running.wait()
                done[name] = Done(name, running.status, running.took, self.out / f"{name}.log")
        found = [done[piece.name] for piece in pieces]
        for one in found:
            if one.status != 0:
                self.failed = True
                self.row(one.name, one.outcome())
        return found

    def python(self, name: str, seconds: float, *arguments: str, **environment: str) -> Done:
        """Run this Python with arguments as a piece."""
        (done,) = self.run(Piece(name, seconds, [sys.executable, *arguments], environment))
        return done


def _environment(rehearse: bool) -> dict[str, str]:
    """Of this process, less what would change what is measured, and so that nothing needs to be installed."""
    found = {name: value for name, value in os.environ.items() if name not in ("RLRR_BACKEND", "TRITON_INTERPRET")}
    found |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "NO_COLOR": "1", "MPLBACKEND": "Agg", "COLUMNS": "170"}
    found.setdefault("HOME", str(ROOT))  # of Triton's cache
    found.setdefault("RLRR_TUNED", "0")  # what an earlier day tuned would change this one's figures
    paths = [str(ROOT), found.get("PYTHONPATH", "")]
    programs = [found.get("PATH", ""), "/usr/local/cuda/bin"]
    if rehearse:
        paths.insert(0, str(PRETENDED_GPU))
        programs.insert(0, str(PRETENDED_GPU / "bin"))
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PATH": os.pathsep.join(programs)}
