"""Compile Triton's kernels on all cores before anything is timed: ``python -m benchmarks.first_day.precompile``.

On a machine with a GPU compiling takes most of a short session, and a measuring process compiles on one core. Launches
are those of ViT-B/16's linears, the same that the suites do, so that Triton's cache has them afterwards.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from benchmarks.disassemble import without_gpu
from benchmarks.implementations import LAYERS
from benchmarks.results import one_line
from rlrr_kernels.backends.problem import Pass, Problem
from rlrr_kernels.backends.triton.choose import Device, cuda_device
from rlrr_kernels.tune.candidates import Candidate, Tensors, describe, run, tiles

DTYPES = ("bfloat16", "float16", "float32")


class Job(NamedTuple):
    """One launch. ``choice``: which of the tiles that ``rlrr-tune`` measures, 0 the backend's own."""

    problem: Problem
    backend: str
    choice: int


def jobs(
    tokens: Sequence[int], layers: Sequence[str], dtypes: Sequence[str], candidates: int, backends: Sequence[str]
) -> list[Job]:
    """The own launch and up to ``candidates`` others of each pass, what takes longest to compile first."""
    passes: tuple[Pass, ...] = ("grad_scales", "forward", "grad_input")
    return [
        Job(Problem(kernel, m, *LAYERS[layer], getattr(torch, dtype), getattr(torch, dtype)), backend, choice)
        for kernel in passes
        for choice in range(candidates + 1)
        for backend, dtype, m, layer in itertools.product(backends, dtypes, tokens, layers)
    ]


def compile_one(device: Device, job: Job) -> str | None:
    """Compile a launch for a GPU; why it failed, or None."""
    _, m, n, k, groups, dtype, *_ = job.problem

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        with without_gpu(device, []):
            found = tiles(job.backend, job.problem, device)
            if job.choice < len(found):  # there may be fewer
                x, weight, dy = empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(m, n, dtype=dtype)
                tensors = Tensors(x, weight, dy, empty(n, 1), empty(groups, 1, k), empty(n, dtype=dtype), empty(n))
                run(job.problem, tensors, Candidate(job.backend, found[job.choice]))
    except Exception as error:  # whatever the compiler says of one launch, the others are compiled
        return f"{job.backend} {describe(job.problem)} {dtype}, choice {job.choice}: {one_line(error)}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all compiled, 1 where one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_day.precompile", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", required=True, metavar="M")
    parser.add_argument("--layers", choices=LAYERS, nargs="+", default=list(LAYERS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--candidates", type=int, default=0, help="of rlrr-tune, beside the rule's choice")
    parser.add_argument("--jobs", type=int, required=True, help="processes")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("precompile: no CUDA device is visible to torch", file=sys.stderr)
        return 2
    began = time.monotonic()
    device = cuda_device(0)
    backends = ("gluon", "triton") if device.capability[0] == 9 else ("triton",)
    todo = jobs(args.tokens, args.layers, args.dtype, args.candidates, backends)
    failed = []
    try:
        with ProcessPoolExecutor(min(args.jobs, len(todo)), multiprocessing.get_context("spawn")) as pool:
            compile_here = functools.partial(compile_one, device)
            failed = [why for why in pool.map(compile_here, todo) if why]
    except BrokenProcessPool as error:
        failed.append(f"the compiler ended its process: {error}")
    print("\n".join(failed))
    print(f"{len(todo)} launches compiled in {time.monotonic() - began:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
