"""The first day on a GPU: ``python -m benchmarks.first_day STAGE...``.

Each stage goes on past what fails or hangs, and its results are rows of the table. A call of ten minutes takes stages
that belong together: ``env build correct ratios tests`` shows whether the package is right and how fast a pass is,
``core sanitize launch`` the figures of the suites and races; then ``step``, and ``tune norm``. Compiling takes most of
the time on a GPU that has never run the kernels, so it comes first and on all cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import groups, results, tables
from benchmarks.first_day import probes, pytest_outcomes
from benchmarks.first_day.day import ROOT, Day, Done, Piece
from benchmarks.implementations import LAYERS, TOKENS
from rlrr_kernels.check.cases import TOKENS as CHECKED
from rlrr_kernels.check.processes import exit_on_signals
from rlrr_kernels.io.checks import error_line

PROBES = "benchmarks.first_day.probes"
#: Batch sizes that a pass is timed at, besides those of the suites.
IMAGES = (64, 256, 1)
#: Seconds that a test may take on a GPU before it counts as hanging.
TEST_SECONDS = 150
#: Most important first.
TESTS = ("tests/backends/test_cuda.py", "tests/backends", "tests")


def env(day: Day) -> None:
    """Show the GPU, the packages and the ceilings."""
    size = ("--size", "128") if day.rehearse else ()
    done = day.python("env", 90, "-m", PROBES, "machine", *size)
    day.row_if_ok(done)
    day.rows(done.lines[-6:])


def build(day: Day) -> None:
    """Build the CUDA library for this GPU, unless the library that is here serves it."""
    done = day.python("library", 60, "-m", PROBES, "library")
    if done.status == 1 and done.last.startswith("architecture "):
        wanted = {"RLRR_BUILD_CPU": "0", "RLRR_BUILD_CUDA": "1", "MAX_JOBS": str(day.jobs)}
        wanted["TORCH_CUDA_ARCH_LIST"] = done.last.removeprefix("architecture ")
        day.python("build", 240, str(ROOT / "setup.py"), "build_ext", "--inplace", **wanted)
        done = day.python("library-built", 60, "-m", PROBES, "library")
    if done.status == 0:
        day.row("build", done.lines[0])


def correct(day: Day) -> None:
    """Run ``python -m rlrr_kernels check``: every pass of every backend against float64; what fails is never timed."""
    _precompile(day, "correct", [CHECKED["cuda"]], "--dtype", "bfloat16", "float16", "float32")
    # the shapes for a GPU would take a CPU an hour
    options = ["--device", "cpu"] if day.rehearse else []
    done = day.python("correct", 280, "-m", "rlrr_kernels", "check", *options)
    day.row_if_ok(done, done.outcome())
    day.rows(done.lines[-24:])


def one_pass(day: Day) -> None:
    """Time each pass of each backend beside BLAS's bare product."""
    images = [1] if day.rehearse else list(IMAGES)
    _precompile(day, "ratios", [TOKENS * count for count in images])
    out = day.out / "passes.jsonl"
    out.unlink(missing_ok=True)
    options = ["--images", *map(str, images), "--rounds", *(("1", "1") if day.rehearse else ("7", "40"))]
    for layer in ["proj"] if day.rehearse else LAYERS:
        day.python(f"ratios-{layer}", 75, "-m", PROBES, "passes", layer, "--out", str(out), *options)
    day.row("ratios", "BLAS's bare product / ours: above 1 where ours is faster")
    if out.exists():
        day.rows(probes.table_of_passes(map(json.loads, out.read_text().splitlines())))


def tests(day: Day) -> None:
    """Run the tests that need a GPU, without campaigns; a test that hangs or loses the GPU costs one worker."""
    out = day.out / "tests.jsonl"
    out.unlink(missing_ok=True)
    command = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu and not slow"]
    command += ["-p", "benchmarks.first_day.pytest_outcomes", "--outcomes", str(out)]
    command += ["-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(day.jobs, 12)), "--max-worker-restart", "60"]
    paths = ["tests/backends/test_numerics.py", "-k", "test_bias or test_strides"] if day.rehearse else list(TESTS)
    done = day.python("tests", 330, *command, *paths, OMP_NUM_THREADS="2")
    lines = pytest_outcomes.summary(out.read_text().splitlines()) if out.exists() else [done.last]
    day.row("tests", lines[0])
    day.rows(lines[1:])


def sanitize(day: Day) -> None:
    """Run each pass of each backend at tiny shapes under memcheck and racecheck."""
    # without the allocator's cache an access outside of a tensor is outside of an allocation
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    # what stands in for the tool at a rehearsal does not look which it is
    for tool in ("racecheck",) if day.rehearse else ("memcheck", "racecheck"):
        pieces = {}
        for backend, which in itertools.product(probes.BACKENDS, probes.PRODUCTS):
            command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
            # racecheck does not know the barriers of the copy engine: its findings on Hopper's kernels are to be read
            hopper = backend in ("gluon", "hopper")
            command += [] if tool == "racecheck" and hopper else ["--error-exitcode", "9"]
            command += [sys.executable, "-m", PROBES, "sanitize", backend, which]
            pieces[backend, which] = Piece(f"{tool}-{backend}-{which}", 240, command, uncached)
        found = dict(zip(pieces, day.run(*pieces.values()), strict=True))
        for backend in probes.BACKENDS:
            outcomes = (f"{which}: {sanitizer_outcome(found[backend, which])}" for which in probes.PRODUCTS)
            day.row(f"{tool} {backend}", "; ".join(outcomes))


def sanitizer_outcome(done: Done) -> str:
    """Return "clean" if the tool found nothing and all values are right, else the lines of the log that say more."""
    marks = ("SUMMARY", "values wrong", "not here", "Internal Sanitizer", "not supported")
    lines = [line.strip("= ") for line in done.lines if any(mark in line for mark in marks)]
    clean = "values wrong: 0" in lines and re.search(r"SUMMARY: 0 (errors|hazards)", " ".join(lines))
    return "clean" if clean and done.status == 0 else ", ".join(lines) or done.outcome()


def core(day: Day) -> None:
    """Run the layer suite of ViT-B/16 in bfloat16 at one batch size, without the rival that searches for minutes."""
    if day.rehearse:
        narrow = ["--images", "1", "--rounds", "1", "-k", "proj and forward_no_grad and (rlrr or plain)"]
    else:
        _precompile(day, "core", [TOKENS * IMAGES[0]])
        narrow = ["--images", str(IMAGES[0]), "-k", "not autotune"]
    _suite(day, "core", 300, "test_layer.py", "--chunk", "layer-vit_b-bfloat16", *narrow)


def launch(day: Day) -> None:
    """Measure the CPU time of a call at rank 1."""
    narrow = ["--rounds", "1", "--dtype", "float32"] if day.rehearse else []
    _suite(day, "launch", 120, "test_launch.py", "--chunk", "launch", "-k", "not r8 and not r32", *narrow)


def step(day: Day) -> None:
    """Measure whole training steps of ViT-B/16, first those that its targets compare."""
    if day.rehearse:  # the slice for a CPU
        narrow = ["--images", "1", "--rounds", "1", "--dtype", "float32", "-k", "probe"]
    else:
        _precompile(day, "step", [TOKENS * IMAGES[0]])
        narrow = ["--chunk", "step-vit_b-64", "-k", "rlrr or official or full or probe"]
    _suite(day, "step", 400, "test_vit_step.py", *narrow)


def norm(day: Day) -> None:
    """Measure LayerNorm with SSF's affine."""
    narrow = ["--rounds", "1", "--images", "1"] if day.rehearse else []
    _suite(day, "norm", 200, "test_norm.py", "--chunk", "norm", *narrow)


def tune(day: Day) -> None:
    """Run ``rlrr-tune`` for ViT-B/16 at one batch size, for all backends and for the two that are made for Hopper."""
    limit = 10
    if day.rehearse:  # only the plan: a pretended GPU has no graphs to time by
        options = ["--shape", "64,64,64", "--dtype", "float32", "--device", "cpu", "--dry-run"]
    else:
        _precompile(day, "tune", [TOKENS * IMAGES[0]], "--candidates", str(limit))
        options = ["--model", "vit_base_patch16_224", "--batch", str(IMAGES[0]), "--rounds", "20"]
    for name, hopper, rivals in (("tune", "0", []), ("tune-hopper", "1", ["--backend", "gluon", "--backend", "cuda"])):
        table = str(day.out / f"{name}.json")
        narrow = ["--backend", "cpu"] if day.rehearse else rivals
        command = ["-m", "rlrr_kernels.tune.__main__", *options, *narrow, "--out", table, "--limit", str(limit)]
        done = day.python(name, 240, *command, RLRR_CUDA_HOPPER=hopper)
        day.row_if_ok(done, table)
        day.rows(done.lines[-24:])


STAGES: dict[str, Callable[[Day], None]] = {
    **{"env": env, "build": build, "correct": correct, "ratios": one_pass, "tests": tests, "sanitize": sanitize},
    **{"core": core, "launch": launch, "step": step, "tune": tune, "norm": norm},
}
DEFAULT = ("env", "build", "correct", "ratios", "tests")


def _precompile(day: Day, stage: str, tokens: Sequence[int], *options: str) -> None:
    """Compile what a stage will launch; what is missing compiles when it is launched."""
    options = ("--layers", "proj") if day.rehearse else options
    done = day.python(
        *(f"{stage}-compile", 150, "-m", PROBES, "compile"),
        *("--tokens", *map(str, tokens), "--jobs", str(day.jobs), *options),
    )
    day.row_if_ok(done, done.last)


def _suite(day: Day, name: str, seconds: float, file: str, *narrow: str) -> None:
    """Run a part of a benchmark suite; its raw results go below the folder ``results``, its ratios into the table."""
    folder = day.out / "results" / name
    # rivals that are not made a minute before the end are left out, so that the others are measured
    minutes = max(0.5, (min(seconds, day.left) - 60) / 60)
    done = day.python(
        *(name, seconds, "-m", "pytest", str(Path("benchmarks") / file), "-q", "-p", "no:cacheprovider"),
        *("--minutes", f"{minutes:.1f}", "--results", str(folder)),
        *("--results-command", f"make first-day STAGE={name}", *narrow),
    )
    day.row_if_ok(done, done.last)
    if folder.is_dir():
        day.rows(tables.ratios(groups.groups(results.load(folder))).splitlines())


DESCRIPTION = f"""\
The first day on a GPU, in stages: {" ".join(STAGES)}.
Goes on past what fails or hangs, ends itself in time, and prints a table last. Logs, raw
results and the table lie in the folder --out, written as they come.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; return 1 if a piece failed or reported an error, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_day",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="*", metavar="STAGE", help=f"default: {' '.join(DEFAULT)}")
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
    exit_on_signals()
    day = Day(args.out.resolve(), args.limit, args.jobs, args.rehearse)
    began = time.monotonic()
    if args.rehearse:
        day.row("rehearsal", "on a pretended GPU: no number means anything")
    try:
        for stage in args.stage or DEFAULT:
            at = time.monotonic()
            try:
                STAGES[stage](day)
            except Exception as error:  # one stage may fail, the day goes on
                day.failed = True
                day.row(stage, error_line(error))
            day.row(f"--- {stage}", f"{time.monotonic() - at:.0f} s")
    finally:
        print(
            f"\n==== {time.monotonic() - began:.0f} s of {args.limit:g}; everything is in {day.out}\n{day.table()}",
            end="",
        )
    return int(day.failed)


if __name__ == "__main__":
    sys.exit(main())
