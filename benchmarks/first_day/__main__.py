"""``python -m benchmarks.first_day STAGE...``: see :mod:`benchmarks.first_day.stages`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import processes
from benchmarks.first_day.day import Day
from benchmarks.first_day.stages import STAGES
from benchmarks.results import one_line

FIRST = ("env", "build", "correct", "ratios", "tests")
DESCRIPTION = f"""\
The first day on a GPU, in stages: {" ".join(STAGES)}.
Goes on past what fails or hangs, ends itself in time, and prints a table last. Logs, raw
results and the table lie in the folder --out, written as they come.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all is well, 1 where a piece failed or found something wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_day",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="*", metavar="STAGE", help=f"default: {' '.join(FIRST)}")
    out = Path(os.environ.get("OUT") or "runs/first-day")
    parser.add_argument("--out", type=Path, default=out, help="default: $OUT, or else runs/first-day")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for the whole call; default: %(default)g")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile or test at once")
    parser.add_argument("--rehearse", action="store_true", help="on a pretended GPU, for the plumbing alone")
    args = parser.parse_args(arguments)
    for stage in args.stage:
        if stage not in STAGES:
            parser.error(f"stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    for name in ("limit", "jobs"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(args, name):g}")
    processes.exit_on_signals()
    day = Day(args.out.resolve(), args.limit, args.jobs, args.rehearse)
    began = time.monotonic()
    if args.rehearse:
        day.row("rehearsal", "on a pretended GPU: no number means anything")
    try:
        for stage in args.stage or FIRST:
            at = time.monotonic()
            try:
                STAGES[stage](day)
            except Exception as error:  # a stage of its own may fail, the day goes on
                day.failed = True
                day.row(stage, one_line(error))
            day.row(f"--- {stage}", f"{time.monotonic() - at:.0f} s")
    finally:
        print(
            f"\n==== {time.monotonic() - began:.0f} s of {args.limit:g}; everything is in {day.out}\n{day.table()}",
            end="",
        )
    return int(day.failed)


if __name__ == "__main__":
    sys.exit(main())
