"""A layer beside busy processes: ``python -m benchmarks.busy`` (four minutes at most).

Forward and backward in float32 on the CPU, by this package, the published formula and a plain linear in turns, while
other processes, which this program starts, multiply matrices. A user waits for the mean time, and calls that sometimes
wait for a thread without a core raise it far above the median. ``--write`` writes the rounds to
``benchmarks/results/cpu/busy.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks import results, timing
from benchmarks.implementations import LAYERS, TOKENS, call, make_inputs
from benchmarks.tables import markdown
from benchmarks.timing import Variant

#: Name -> threads of each busy process.
NEIGHBOURS: dict[str, tuple[int, ...]] = {"none": (), "1 of 2 threads": (2,), "4 of 1 thread": (1, 1, 1, 1)}
#: (M, N, K, groups) of the demo's qkv, and of ViT-B/16's proj for one image.
SHAPES = {"demo qkv": (544, 384, 128, 3), "ViT-B proj": (TOKENS, *LAYERS["proj"])}
NAMES = (results.OURS, results.FORMULA, results.PLAIN)
#: The most that our mean may be, as a multiple of the formula's.
LIMIT = 1.5

#: Arguments: number of threads, and the parent process, with which it ends.
_WORK = """
import os, sys, torch
torch.set_num_threads(int(sys.argv[1]))
a = torch.randn(512, 512)
print("busy", flush=True)
while os.getppid() == int(sys.argv[2]):
    a @ a
"""


@contextlib.contextmanager
def busy(threads: Sequence[int]) -> Iterator[list[subprocess.Popen[str]]]:
    """Run processes that multiply matrices while the context is open.

    Args:
        threads: Number of threads of each process.

    Raises:
        RuntimeError: If a process does not start, or ends too early.
    """
    with contextlib.ExitStack() as stack:
        processes = []
        for count in threads:
            command = [sys.executable, "-c", _WORK, str(count), str(os.getpid())]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            processes.append(process)
        if any(process.stdout is None or process.stdout.readline() != "busy\n" for process in processes):
            raise RuntimeError("a busy process did not start; its output stands above")
        yield processes
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a busy process ended while it was measured beside")


def measure(neighbours: str, layer: str, threads: int, budget: float, rounds: tuple[int, int]) -> list[dict[str, Any]]:
    """Measure each implementation on ``threads`` threads of torch, and return a row for each."""
    inputs = make_inputs(*SHAPES[layer], torch.float32, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = timing.interleaved(
            {
                name: lambda name=name: Variant([call(name, "both", inputs)])  # type: ignore[misc]
                for name in NAMES
            },
            timing.WallClock(),
            budget,
            rounds,
            warm_seconds=0.3,
        )
    finally:
        torch.set_num_threads(before)
    case = {"neighbours": neighbours, "layer": layer, "threads": threads}
    rows = []
    for name, of in found.items():
        if of.error is not None:
            raise RuntimeError(f"{name}: {of.error}")
        mean, median = statistics.fmean(of.seconds), statistics.median(of.seconds)
        seconds = [round(s, 7) for s in of.seconds]
        rows.append(case | {"implementation": name, "mean": mean, "median": median, "seconds": seconds})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a line for each case: our time / the formula's and the plain linear's, of means and (of medians)."""
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["neighbours"], row["layer"], row["threads"]), {})[row["implementation"]] = row

    def times(row: dict[str, Any]) -> str:
        return f"{row['mean'] * 1e3:.2f} ({row['median'] * 1e3:.2f})"

    def ratio(ours: dict[str, Any], other: dict[str, Any]) -> str:
        return f"{ours['mean'] / other['mean']:.2f} ({ours['median'] / other['median']:.2f})"

    lines = []
    for case, of in cases.items():
        ours = of[results.OURS]
        ratios = [ratio(ours, of[name]) for name in NAMES[1:]]
        lines.append([*map(str, case), str(len(ours["seconds"])), *(times(of[name]) for name in NAMES), *ratios])
    heads = ["busy processes", "layer", "threads", "rounds", *(f"{name}, ms" for name in NAMES)]
    return markdown([*heads, *(f"ours / {name}" for name in NAMES[1:])], lines, left=2)


def worst(rows: Sequence[dict[str, Any]]) -> float:
    """Return the largest ratio of our mean to the formula's mean in the same case."""
    means = {(r["implementation"], r["neighbours"], r["layer"], r["threads"]): r["mean"] for r in rows}
    return max(mean / means[results.FORMULA, *case] for (name, *case), mean in means.items() if name == results.OURS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if our mean is above the limit, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="most for the rounds of a case")
    parser.add_argument("--rounds", type=int, default=150, help="most for a case")
    parser.add_argument("--neighbours", choices=NEIGHBOURS, nargs="+", default=list(NEIGHBOURS))
    parser.add_argument("--layer", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--write", action="store_true", help="write the rounds to benchmarks/results/cpu/busy.json")
    args = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for neighbours in args.neighbours:
        with busy(NEIGHBOURS[neighbours]):
            for layer in args.layer:
                for threads in dict.fromkeys((torch.get_num_threads(), 1)):
                    own = measure(neighbours, layer, threads, args.seconds, (min(5, args.rounds), args.rounds))
                    rows += own
    print(f"Forward and backward, float32, mean (median):\n\n{table(rows)}\n")
    print(f"The most that our mean is of the formula's: {worst(rows):.2f}, wanted: at most {LIMIT}")
    if args.write:
        given = sys.argv[1:] if arguments is None else arguments
        command = shlex.join(["python", "-m", "benchmarks.busy", *given])
        results.save(results.FOLDER / "cpu" / "busy.json", results.head(command) | {"device": "cpu"}, rows)
    return int(worst(rows) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
