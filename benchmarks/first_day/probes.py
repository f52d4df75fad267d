"""What the stages run on the GPU in processes of their own: ``python -m benchmarks.first_day.probes PROBE``.

- ``machine``: the GPU, packages, missing programs, and what BLAS and a copy reach.
- ``library``: whether the CUDA library serves this GPU.
- ``compile``: compile Triton's kernels on all cores, as a process that measures compiles on one core, which takes most
  of a short session on a new GPU. The launches are those of the suites, so that Triton's cache has them afterwards.
- ``passes``: each pass of each backend beside BLAS's bare product, in bfloat16 at ViT-B/16's shapes: the first figures
  of a day, in a minute for each layer where the suites take ten.
- ``sanitize``: one pass at tiny shapes, for compute-sanitizer. Only our kernels and copies run on the GPU; the right
  values are computed on the CPU, as a BLAS under the tool takes minutes and has findings of its own.

Exit status: 0; 1 if something is wrong; 2 without a GPU; 3 if the GPU takes no more work.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import implementations, results, timing
from benchmarks.disassemble import launch_without_data, without_gpu
from benchmarks.implementations import LAYERS, TOKENS, make_inputs
from benchmarks.measures import relative_error
from benchmarks.timing import Call, Unavailable, Variant
from rlrr_kernels.backends import choice, reference
from rlrr_kernels.backends.problem import Pass, Problem
from rlrr_kernels.backends.triton import choose
from rlrr_kernels.io.checks import error_line
from rlrr_kernels.ops import linear
from rlrr_kernels.tune.candidates import Candidate, describe, tiles

PACKAGES = ("torch", "triton", "numpy", "timm", "peft", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis")
PROGRAMS = ("nvcc", "g++", "make", "git", "compute-sanitizer", "nvidia-smi")
#: Name on the command line -> implementation.
BACKENDS = {"gluon": results.GLUON, "triton": results.TRITON, "cuda": results.CUDA, "hopper": results.CUDA_HOPPER}
BLAS = "BLAS"
#: Pass -> the product alone, without rescaling and reductions, of x, W, u, v, b, f and dy.
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "forward": lambda x, w, u, v, b, f, dy: F.linear(x, w, b),
    "grad_input": lambda x, w, u, v, b, f, dy: dy @ w,
    "grad_scales": lambda x, w, u, v, b, f, dy: dy.mT @ x,
}
#: Sanitized M, N, K, groups: odd edges, groups that end within a tile, split sums, whole tiles and one row more.
SHAPES = ((33, 17, 19, 1), (70, 30, 72, 3), (130, 96, 136, 3), (16, 64, 1024, 1), (257, 264, 72, 1))
#: Shapes that Gluon's kernels take: tiles for half of 132 multiprocessors, odd edges, whole groups of rows.
GLUON_SHAPES = ((1001, 1160, 136, 1), (1001, 1152, 136, 3))
#: Largest relative error; the numeric tests hold values to the last bit.
LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-4}
GLUON_LIMITS = {torch.bfloat16: 0.02, torch.float16: 0.003}


def run_pass(module: Any, which: str, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a pass of ``module`` on x, W, u, v, b, f and dy, and return its results."""
    x, w, u, v, b, f, dy = tensors
    arguments = {"forward": (x, w, u, v, b, f), "grad_input": (dy, w, u, v), "grad_scales": (dy, x, w, u, v, True)}
    got = getattr(module, which)(*arguments[which])
    return got if isinstance(got, tuple) else (got,)


def tensors_of(*sizes: int, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """Return random x, W, u, v, b, f and dy of M, N, K and groups."""
    inputs = make_inputs(*sizes, dtype, device, seed)  # type: ignore[call-arg, arg-type]
    return [t.detach() for t in (*inputs.arguments, inputs.dy)]


def machine(size: int) -> int:
    """Print what this machine has and its ceilings, by products of ``size``."""
    library()
    device = torch.cuda.get_device_properties(0)
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h (Triton compiles its launcher with it)")
    print(
        f"{device.name}, {device.multi_processor_count} multiprocessors, L2 {device.L2_cache_size >> 20} MiB;", end=" "
    )
    print(f"the launchers see {choose.cuda_device(0)}")
    packages = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores; {packages}")
    print(f"missing: {', '.join(missing) or 'nothing'}")
    half = [torch.randn(size, size, device="cuda").bfloat16() for _ in range(2)]
    single = torch.randn(size, size, device="cuda")
    source = torch.zeros(4 * size**2, device="cuda")
    target = torch.empty_like(source)
    flops = 2 * size**3 / 1e12
    bf16, copy = _seconds(lambda: half[0] @ half[1]), _seconds(lambda: target.copy_(source))
    fp32 = _seconds(lambda: single @ single)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    tf32 = _seconds(lambda: single @ single)
    print(
        f"ceilings: products of {size}: bfloat16 {flops / bf16:.0f}, TF32 {flops / tf32:.0f}, float32 "
        f"{flops / fp32:.0f} TFLOP/s; a copy {2 * source.nbytes / copy / 1e12:.2f} TB/s"
    )
    return 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _seconds(call: Callable[[], object]) -> float:
    turn = timing.GraphClock()(Variant([Call(call)]))
    return statistics.median(turn() for _ in range(7))


def library() -> int:
    """Print whether the CUDA library serves the GPU here, and the architecture to build it for."""
    x = torch.zeros(2, 2, device="cuda")
    why = choice.refusal("cuda", x, x)
    print(f"CUDA library: {'serves; ' + choice.load('cuda').build() if why is None else why}")  # type: ignore[union-attr]
    major, minor = torch.cuda.get_device_capability()
    print(f"architecture {major}.{minor}{'a' if major >= 9 else ''}")
    return int(why is not None)


class Job(NamedTuple):
    """One launch to compile. ``choice``: index of a tile that ``rlrr-tune`` measures; 0 is the backend's own."""

    problem: Problem
    backend: str
    choice: int


def compile_jobs(
    tokens: Sequence[int], layers: Sequence[str], dtypes: Sequence[str], candidates: int, backends: Sequence[str]
) -> list[Job]:
    """Return the backend's own launch and up to ``candidates`` others of each pass, the slowest to compile first."""
    passes: tuple[Pass, ...] = ("grad_scales", "forward", "grad_input")
    return [
        Job(Problem(kernel, m, *LAYERS[layer], getattr(torch, dtype), getattr(torch, dtype)), backend, choice)
        for kernel in passes
        for choice in range(candidates + 1)
        for backend, dtype, m, layer in itertools.product(backends, dtypes, tokens, layers)
    ]


def compile_one(device: choose.Device, job: Job) -> str | None:
    """Compile a launch for a GPU; return why it failed, or None."""
    try:
        with without_gpu(device, []):
            found = tiles(job.backend, job.problem, device)
            if job.choice < len(found):
                launch_without_data(job.problem, Candidate(job.backend, found[job.choice]))
    except Exception as error:  # one launch that does not compile must not stop the others
        what = f"{job.backend} {describe(job.problem)} {job.problem.dtype}, choice {job.choice}"
        return f"{what}: {error_line(error)}"
    return None


def compile_all(todo: Sequence[Job], device: choose.Device, processes: int) -> int:
    """Compile the launches in several processes, and print what failed."""
    began = time.monotonic()
    failed = []
    try:
        with ProcessPoolExecutor(min(processes, len(todo)), multiprocessing.get_context("spawn")) as pool:
            failed = [why for why in pool.map(functools.partial(compile_one, device), todo) if why]
    except BrokenProcessPool as error:
        failed.append(f"the compiler ended its process: {error}")
    print("\n".join(failed))
    print(f"{len(todo)} launches compiled in {time.monotonic() - began:.0f} s, {len(failed)} failed")
    return int(bool(failed))


def measure_pass(layer: str, images: int, which: str, rounds: tuple[int, int]) -> dict[str, Any]:
    """Measure one pass of a layer on each backend and on BLAS, in turns; return sizes, seconds and errors."""
    n, k, groups = LAYERS[layer]
    m = TOKENS * images
    make = functools.partial(tensors_of, m, n, k, groups, dtype=torch.bfloat16, device="cuda")
    first = make()
    count = min(16, timing.copies(sum(t.nbytes for t in first), timing.l2_bytes()))
    inputs = [first, *(make(seed=seed) for seed in range(1, count))]

    def variant(name: str) -> Variant:
        implementations.served_by(name, first[0], first[1])
        calls = [
            functools.partial(PRODUCTS[which], *i) if name == BLAS else functools.partial(run_pass, linear, which, i)
            for i in inputs
        ]
        return Variant(list(map(Call, calls)), implementations.context(name))

    makers = {name: functools.partial(variant, name) for name in (BLAS, *BACKENDS.values())}
    found = timing.interleaved(makers, timing.device_clock(), 0.4, rounds, warm_seconds=0.15)
    return {
        **{"device": results.device_name(), "layer": layer, "m": m, "n": n, "k": k, "groups": groups, "pass": which},
        "clock": next((rival.clock for rival in found.values() if rival.clock), None),
        "copies": len(inputs),
        "seconds": {name: rival.seconds for name, rival in found.items() if rival.seconds},
        "errors": {name: rival.error for name, rival in found.items() if rival.error},
    }


def table_of_passes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each layer, M and pass: BLAS's time and rate, then its time / ours: above 1 ours is faster."""
    lines = []
    for row in rows:
        medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
        blas = medians.get(BLAS)
        cells = [f"{row['layer']:<5} M = {row['m']:<6,} {row['pass']:<12}"]
        if blas is None:
            cells.append(f"BLAS failed: {row['errors'].get(BLAS, '')}")
        else:
            rate = 2 * row["m"] * row["n"] * row["k"] / blas / 1e12
            cells.append(f"BLAS {blas * 1e6:.0f} us, {rate:.0f} TFLOP/s; BLAS / ours:")
        for name in BACKENDS.values():
            short = name.partition("/")[2]
            if blas is not None and name in medians:
                cells.append(f"{short} {blas / medians[name]:.2f}")
            elif name in row["errors"]:
                cells.append(f"{short} failed: {row['errors'][name][:40]}")
        cells += [f"[{row['clock']}]"] if row["clock"] != results.GRAPH else []
        lines.append(" ".join(cells))
    return lines


def measure_passes(layer: str, images: Sequence[int], rounds: tuple[int, int], out: Path) -> int:
    """Measure all passes of a layer; a line of JSON is added to ``out`` for each."""
    failed = False
    for count, which in itertools.product(images, PRODUCTS):
        row = measure_pass(layer, count, which, rounds)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*table_of_passes([row]), flush=True)
        failed |= bool(row["errors"])
        fault = timing.gpu_fault()
        if fault is not None:
            print(f"the GPU failed: {fault}", flush=True)
            return 3
    return int(failed)


def sanitize(backend: str, which: str) -> int:
    """Run a pass at tiny shapes and print the values that are wrong; a backend that is not here is no error."""
    wrong = []
    gluon = backend == "gluon"
    for shape, (dtype, limit) in itertools.product(
        GLUON_SHAPES if gluon else SHAPES, (GLUON_LIMITS if gluon else LIMITS).items()
    ):
        tensors = tensors_of(*shape, dtype=dtype, device="cpu")
        on_gpu = [t.cuda() for t in tensors]
        try:
            implementations.served_by(BACKENDS[backend], on_gpu[0], on_gpu[1])
        except Unavailable as reason:
            print(f"not here: {reason}")
            return 0
        with implementations.context(BACKENDS[backend])():
            got = run_pass(torch.ops.rlrr, which, on_gpu)
        error = relative_error([t.cpu() for t in got], run_pass(reference, which, [t.double() for t in tensors]))
        if not error <= limit:
            wrong.append(f"at {shape}, {dtype}: expected an error of {limit:g} at most, got {error:.3g}")
    print("\n".join(wrong))
    print(f"values wrong: {len(wrong)}")
    return int(bool(wrong))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a probe and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_day.probes")
    probes = parser.add_subparsers(dest="probe", required=True)
    one = probes.add_parser("machine")
    one.add_argument("--size", type=int, default=8192, help="rows and columns of the products")
    probes.add_parser("library")
    one = probes.add_parser("compile")
    one.add_argument("--tokens", type=int, nargs="+", required=True, metavar="M")
    one.add_argument("--layers", choices=LAYERS, nargs="+", default=list(LAYERS))
    one.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), nargs="+", default=["bfloat16"])
    one.add_argument("--candidates", type=int, default=0, help="tiles of rlrr-tune, beside the rule's choice")
    one.add_argument("--jobs", type=int, required=True, help="processes")
    one = probes.add_parser("passes")
    one.add_argument("layer", choices=LAYERS)
    one.add_argument("--images", type=int, nargs="+", required=True)
    one.add_argument("--rounds", type=int, nargs=2, required=True, metavar=("LEAST", "MOST"))
    one.add_argument("--out", type=Path, required=True, help="a line of JSON is added for each pass")
    one = probes.add_parser("sanitize")
    one.add_argument("backend", choices=BACKENDS)
    one.add_argument("which", choices=PRODUCTS, metavar="pass")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device is visible to torch")
        return 2
    if args.probe == "machine":
        return machine(args.size)
    if args.probe == "library":
        return library()
    if args.probe == "passes":
        return measure_passes(args.layer, args.images, tuple(args.rounds), args.out)
    if args.probe == "sanitize":
        return sanitize(args.backend, args.which)
    device = choose.cuda_device(0)
    backends = ("gluon", "triton") if device.capability[0] == 9 else ("triton",)
    return compile_all(compile_jobs(args.tokens, args.layers, args.dtype, args.candidates, backends), device, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
