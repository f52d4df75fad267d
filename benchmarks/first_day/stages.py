"""The stages of a first day. Each goes on past what fails or hangs, and says in the table what it found.

Cut so that a call of ten minutes takes what belongs together: ``env build correct ratios tests`` shows whether it is
right and how fast a pass is, ``core sanitize launch`` the suites' own figures and races; then ``step``, and
``tune norm``.
Compiling takes most of the time on a GPU that meets the kernels for the first time, so it comes first and on all cores.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import groups, ratios, results
from benchmarks.first_day import passes, reports, sanitized
from benchmarks.first_day.day import ROOT, Day, Done, Piece
from benchmarks.implementations import LAYERS, TOKENS
from rlrr_kernels.check.cases import TOKENS as CHECKED

#: Batch sizes that a pass is timed at, besides the suites' own.
IMAGES = (64, 256, 1)
#: What a test may take on a GPU before it counts as hanging.
TEST_SECONDS = 150
#: In the order of what they tell.
TESTS = ("tests/backends/test_cuda.py", "tests/backends", "tests")


def env(day: Day) -> None:
    """The GPU, the packages, the ceilings."""
    size = ("--size", "128") if day.rehearse else ()
    done = day.python("env", 90, "-m", "benchmarks.first_day.surroundings", *size)
    day.note(done)
    day.rows(done.lines[-5:])


def build(day: Day) -> None:
    """The CUDA library for this GPU, unless the one that is here serves it."""
    library = ("-m", "benchmarks.first_day.surroundings", "--library")
    done = day.python("library", 60, *library)
    if done.status == 1 and done.last.startswith("architecture "):
        wanted = {"RLRR_BUILD_CPU": "0", "RLRR_BUILD_CUDA": "1", "MAX_JOBS": str(day.jobs)}
        wanted["TORCH_CUDA_ARCH_LIST"] = done.last.removeprefix("architecture ")
        day.python("build", 240, str(ROOT / "setup.py"), "build_ext", "--inplace", **wanted)
        done = day.python("library-built", 60, *library)
    if done.status == 0:
        day.row("build", done.lines[0])


def correct(day: Day) -> None:
    """``python -m rlrr_kernels check``: every pass of every backend against float64; what fails is never timed."""
    _precompile(day, "correct", [CHECKED["cuda"]], "--dtype", "bfloat16", "float16", "float32")
    # a GPU's shapes would take a CPU an hour
    options = ["--device", "cpu"] if day.rehearse else []
    done = day.python("correct", 280, "-m", "rlrr_kernels", "check", *options)
    day.note(done, done.outcome())
    day.rows(done.lines[-24:])


def one_pass(day: Day) -> None:
    """Each pass of each backend beside BLAS's bare product."""
    images = [1] if day.rehearse else list(IMAGES)
    _precompile(day, "ratios", [TOKENS * count for count in images])
    out = day.out / "passes.jsonl"
    out.unlink(missing_ok=True)
    options = ["--images", *map(str, images), "--rounds", *(("1", "1") if day.rehearse else ("7", "40"))]
    for layer in ["proj"] if day.rehearse else LAYERS:
        day.python(f"ratios-{layer}", 75, "-m", "benchmarks.first_day.passes", layer, "--out", str(out), *options)
    day.row("ratios", "BLAS's bare product / ours: above 1 where ours is faster")
    if out.exists():
        day.rows(passes.table(map(json.loads, out.read_text().splitlines())))


def tests(day: Day) -> None:
    """What of the test suite runs on a GPU, but for campaigns; a test that hangs or loses the GPU costs a worker."""
    out = day.out / "tests.jsonl"
    out.unlink(missing_ok=True)
    command = ["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "benchmarks.first_day.reports"]
    command += ["--reports", str(out), "-m", "gpu and not slow"]
    command += ["-o", f"faulthandler_timeout={TEST_SECONDS}", "-o", "faulthandler_exit_on_timeout=true"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(day.jobs, 12)), "--max-worker-restart", "60"]
    paths = ["tests/backends/test_numerics.py", "-k", "test_bias or test_strides"] if day.rehearse else list(TESTS)
    done = day.python("tests", 330, *command, *paths, OMP_NUM_THREADS="2")
    said = reports.summary(out.read_text().splitlines()) if out.exists() else [done.last]
    day.row("tests", said[0])
    day.rows(said[1:])


def sanitize(day: Day) -> None:
    """Each pass of each backend at tiny shapes under memcheck and racecheck."""
    # without the allocator's cache an access outside of a tensor is outside of an allocation
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "2"}
    for tool in ("memcheck", "racecheck"):
        pieces = {}
        for backend, which in itertools.product(sanitized.NAMES, sanitized.PASSES):
            command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
            # racecheck is not made for the copy engine's barriers: what it says of Hopper's kernels is to be read
            hopper = backend in ("gluon", "hopper")
            command += [] if tool == "racecheck" and hopper else ["--error-exitcode", "9"]
            command += [sys.executable, "-m", "benchmarks.first_day.sanitized", backend, which]
            pieces[backend, which] = Piece(f"{tool}-{backend}-{which}", 240, command, uncached)
        found = dict(zip(pieces, day.run(*pieces.values()), strict=True))
        for backend in sanitized.NAMES:
            said = (f"{which}: {_sanitizer(found[backend, which])}" for which in sanitized.PASSES)
            day.row(f"{tool} {backend}", "; ".join(said))


def _sanitizer(done: Done) -> str:
    """What a tool's log comes to, and whether values were right."""
    marks = ("SUMMARY", "values wrong", "not here", "Internal Sanitizer", "not supported")
    said = [line.strip("= ") for line in done.lines if any(mark in line for mark in marks)]
    clean = "values wrong: 0" in said and re.search(r"SUMMARY: 0 (errors|hazards)", " ".join(said))
    return "clean" if clean and done.status == 0 else ", ".join(said) or done.outcome()


def core(day: Day) -> None:
    """The layer suite of ViT-B/16 in bfloat16 at one batch size, without the rival that searches for minutes."""
    if day.rehearse:
        narrow = ["--images", "1", "--rounds", "1", "-k", "proj and forward_no_grad and (rlrr or plain)"]
    else:
        _precompile(day, "core", [TOKENS * IMAGES[0]])
        narrow = ["--images", str(IMAGES[0]), "-k", "not autotune"]
    _suite(day, "core", 300, "test_layer.py", "--chunk", "layer-vit_b-bfloat16", *narrow)


def launch(day: Day) -> None:
    """What a call costs the CPU."""
    narrow = ["--rounds", "1", "--dtype", "float32"] if day.rehearse else []
    _suite(day, "launch", 120, "test_launch.py", "--chunk", "launch", *narrow)


def step(day: Day) -> None:
    """Whole training steps of ViT-B/16; what its targets compare first."""
    if day.rehearse:  # the slice for a CPU
        narrow = ["--images", "1", "--rounds", "1", "--dtype", "float32", "-k", "probe"]
        _suite(day, "step", 400, "test_vit_step.py", *narrow)
        return
    _precompile(day, "step", [TOKENS * IMAGES[0]])
    narrow = ["--chunk", "step-vit_b-64", "-k", "rlrr or official or full or probe"]
    _suite(day, "step", 400, "test_vit_step.py", *narrow)


def norm(day: Day) -> None:
    """LayerNorm with SSF's affine."""
    narrow = ["--rounds", "1", "--images", "1"] if day.rehearse else []
    _suite(day, "norm", 200, "test_norm.py", "--chunk", "norm", *narrow)


def tune(day: Day) -> None:
    """Which backend and tile ``rlrr-tune`` finds fastest for ViT-B/16 at one batch size, and Hopper's two rivals."""
    limit = 10
    if day.rehearse:  # a plan alone: a pretended GPU has no graphs to time by
        options = ["--shape", "64,64,64", "--dtype", "float32", "--device", "cpu", "--dry-run"]
    else:
        _precompile(day, "tune", [TOKENS * IMAGES[0]], "--candidates", str(limit))
        options = ["--model", "vit_base_patch16_224", "--batch", str(IMAGES[0]), "--rounds", "20"]
    for name, hopper, rivals in (("tune", "0", []), ("tune-hopper", "1", ["--backend", "gluon", "--backend", "cuda"])):
        table = str(day.out / f"{name}.json")
        narrow = ["--backend", "cpu"] if day.rehearse else rivals
        command = ["-m", "rlrr_kernels.tune.__main__", *options, *narrow, "--out", table, "--limit", str(limit)]
        done = day.python(name, 240, *command, RLRR_CUDA_HOPPER=hopper)
        day.note(done, table)
        day.rows(done.lines[-24:])


STAGES: dict[str, Callable[[Day], None]] = {
    **{"env": env, "build": build, "correct": correct, "ratios": one_pass, "tests": tests, "sanitize": sanitize},
    **{"core": core, "launch": launch, "step": step, "tune": tune, "norm": norm},
}


def _precompile(day: Day, stage: str, tokens: Sequence[int], *options: str) -> None:
    """Compile what a stage will launch; it compiles the rest itself."""
    options = ("--layers", "proj") if day.rehearse else options
    done = day.python(
        *(f"{stage}-compile", 150, "-m", "benchmarks.first_day.precompile"),
        *("--tokens", *map(str, tokens), "--jobs", str(day.jobs), *options),
    )
    day.note(done, done.last)


def _suite(day: Day, name: str, seconds: float, file: str, *narrow: str) -> None:
    """A part of a benchmark suite, its raw results below the folder ``results``, and its table of ratios."""
    folder = day.out / "results" / name
    # what is not made a minute before the end is left out, so that the others are measured
    minutes = max(0.5, (min(seconds, day.left) - 60) / 60)
    done = day.python(
        *(name, seconds, "-m", "pytest", str(Path("benchmarks") / file), "-q", "-p", "no:cacheprovider"),
        *("--minutes", f"{minutes:.1f}", "--results", str(folder)),
        *("--results-command", f"make first-day STAGE={name}", *narrow),
    )
    day.note(done, done.last)
    if folder.is_dir():
        day.rows(ratios.table(groups.groups(results.load(folder))).splitlines())
