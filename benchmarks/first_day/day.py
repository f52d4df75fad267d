"""One call of the first day: its clock, its folder, the processes of its stages, and its final table."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlrr_kernels.check.processes import TIME_OUT, Process, end

ROOT = Path(__file__).parents[2]
PRETENDED_GPU = ROOT / "tests" / "pretended_gpu"
#: Seconds that are kept for the end of a call, and the fewest that are worth starting a piece with.
RESERVE, LEAST = 8.0, 15.0


@dataclass(frozen=True)
class Piece:
    """A command to run.

    Attributes:
        name: Heads its row of the table, and names its log.
        seconds: The most that it may take.
        environment: Variables beside those of the day.
    """

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Done:
    """The result of a piece.

    Attributes:
        status: Its exit status; ``TIME_OUT`` if it was ended; None if it was not started.
        seconds: How long it ran.
        log: The file with all its output; missing if it was not started.
    """

    name: str
    status: int | None
    seconds: float
    log: Path

    @property
    def lines(self) -> list[str]:
        """The output without empty lines."""
        if not self.log.exists():
            return []
        return [line.rstrip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]

    @property
    def last(self) -> str:
        """The last line of the output."""
        return self.lines[-1].strip() if self.lines else ""

    def outcome(self) -> str:
        """Return the result in a few words, with the last line if it did not end well."""
        if self.status is None:
            return "not started: no time left"
        took = f"after {self.seconds:.0f} s"
        if self.status == TIME_OUT:
            return f"TIME OUT {took}: {self.last}"
        if self.status < 0:
            return f"DIED of signal {-self.status} {took}: {self.last}"
        return f"ok {took}" if self.status == 0 else f"FAILED with status {self.status} {took}: {self.last}"


@dataclass
class Day:
    """What the stages of one call share.

    Attributes:
        out: Folder for logs, raw results and the table.
        limit: Seconds after which everything has ended.
        jobs: Processes at once where they only compile or test.
        rehearse: Run on a pretended GPU, with tiny shapes.
        environment: Environment of every piece.
        failed: Whether a piece failed or reported an error.
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
        if self.rehearse:  # verdicts on a pretended GPU must not be kept for real ones
            self.environment["RLRR_CHECKED_FILE"] = str(self.out / "checked.json")

    @property
    def left(self) -> float:
        """Seconds that a piece started now may take."""
        return self._began + self.limit - time.monotonic() - RESERVE

    def row(self, name: str, text: str = "") -> None:
        """Add a line to the table, and write the table at once."""
        self._rows.append(f"{name:<26} {text}"[:170].rstrip())
        (self.out / "table.txt").write_text(self.table())
        print(self._rows[-1], flush=True)

    def row_if_ok(self, done: Done, text: str = "") -> None:
        """Add a row for a piece that ended well; :meth:`run` has added one for each other."""
        if done.status == 0:
            self.row(done.name, text)

    def rows(self, lines: Sequence[str]) -> None:
        """Add lines below the last row."""
        for line in lines:
            self.row(f"  {line}")

    def table(self) -> str:
        """Return all rows so far."""
        return "".join(f"{row}\n" for row in self._rows)

    def run(self, *pieces: Piece) -> list[Done]:
        """Run pieces in parallel, and add a row for each that does not end well."""
        done: dict[str, Done] = {}
        started: dict[str, Process] = {}
        logs = {piece.name: self.out / f"{piece.name}.log" for piece in pieces}
        try:
            for piece in pieces:
                log = logs[piece.name]
                log.unlink(missing_ok=True)
                if self.left < LEAST:
                    done[piece.name] = Done(piece.name, None, 0.0, log)
                    continue
                environment = {**self.environment, **piece.environment}
                limit = min(piece.seconds, self.left)
                with log.open("ab") as out:
                    started[piece.name] = Process(piece.command, limit, environment, out, subprocess.STDOUT)
            for name, process in started.items():
                process.wait()
                done[name] = Done(name, process.status, process.seconds, logs[name])
        finally:
            end(started.values())
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
    """Return this process's environment without what would change the figures; no package needs to be installed."""
    found = {name: value for name, value in os.environ.items() if name not in ("RLRR_BACKEND", "TRITON_INTERPRET")}
    found |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "NO_COLOR": "1", "MPLBACKEND": "Agg", "COLUMNS": "170"}
    found.setdefault("HOME", str(ROOT))  # Triton's cache lies below it
    found.setdefault("RLRR_TUNED", "0")  # entries of an earlier day would change the figures of this one
    paths = [str(ROOT), found.get("PYTHONPATH", "")]
    programs = [found.get("PATH", ""), "/usr/local/cuda/bin"]
    if rehearse:
        paths.insert(0, str(PRETENDED_GPU))
        programs.insert(0, str(PRETENDED_GPU / "bin"))
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PATH": os.pathsep.join(programs)}
