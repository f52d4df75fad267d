"""The whole suite on a GPU, a process and a results file for each chunk: ``python -m benchmarks.chunks [PREFIX]``.

A chunk takes under ten minutes on an H200, by estimate, and is ended after ``--seconds``. Each of this package's
backends is checked first, unless it was before (`python -m rlrr_kernels check`); one that is wrong is not run.
A prefix, as ``layer-vit_b``, ``norm`` or ``step``, selects the chunks whose names start so; ``--list`` prints them.
What stands behind ``--`` goes to pytest: ``-- -k "not autotune"`` leaves out the rival that searches tiles for a
minute a shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import cases, processes
from rlrr_kernels.check import command as check

FOLDER = Path(__file__).parent
SUITES = {"layer": "test_layer.py", "norm": "test_norm.py", "launch": "test_launch.py", "step": "test_vit_step.py"}


#: A chunk that takes longer hangs, or is no chunk for this GPU.
SECONDS = 900.0


def command(chunk: str, options: Sequence[str] = ()) -> list[str]:
    """What measures a chunk and writes its results; ``options``: more of pytest's."""
    suite = FOLDER / SUITES[chunk.partition("-")[0]]
    regenerates = f"make bench-gpu CHUNK={chunk}"
    return [
        *(sys.executable, "-m", "pytest", str(suite), "-q"),
        *options,
        *("--chunk", chunk, "--results", "--results-command", regenerates),
    ]


def run(chunks: Sequence[str], start: Callable[[list[str]], int], options: Sequence[str] = ()) -> list[str]:
    """Run each chunk, whatever became of those before it, and return those that failed.

    ``start`` runs a command and returns its exit status; ``options`` go to pytest.
    """
    failed = []
    for number, chunk in enumerate(chunks, 1):
        print(f"chunk {number} of {len(chunks)}: {chunk}", flush=True)
        status = start(command(chunk, options))
        if status == processes.TIME_OUT:
            print(f"{chunk}: its time was up", file=sys.stderr)
        if status != 0:
            failed.append(chunk)
    return failed


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind ``--``."""
    at = [*arguments, "--"].index("--")
    return list(arguments[:at]), list(arguments[at + 1 :])


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 where a case failed, 2 for a bad argument or without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chunks", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("prefix", nargs="?", default="", help="of the names of the chunks to run; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a chunk; default: %(default)g")
    own, options = _split(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(own)
    chunks = [name for name in cases.chunks() if name.startswith(args.prefix)]
    if not chunks:
        parser.error(f"prefix: expected the start of a chunk's name (see --list), got {args.prefix!r}")
    if args.list:
        print("\n".join(chunks))
        return 0
    if not torch.cuda.is_available():
        print(
            "bench-gpu: no CUDA device is visible to torch; `pytest benchmarks/` measures a slice on a CPU",
            file=sys.stderr,
        )
        return 2
    processes.exit_on_signals()
    try:
        wrong, untried = check.failures(torch.device("cuda", torch.cuda.current_device()))
    except OSError as error:  # the chunks' processes would not know what is wrong
        print(f"bench-gpu: what the check found cannot be kept: {error}", file=sys.stderr)
        return 2
    for name, reason in wrong.items():
        print(f"backend {name} is not measured, its check failed: {reason}", file=sys.stderr)
    for name, reason in untried.items():
        print(f"backend {name} is measured unchecked, its check could not be made: {reason}", file=sys.stderr)
    failed = run(chunks, lambda command: processes.run(command, args.seconds), options)
    if failed:
        print(f"chunks with a failed case, or not at their end: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or wrong or untried else 0


if __name__ == "__main__":
    sys.exit(main())
