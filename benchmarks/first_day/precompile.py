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
from dataclasses import dataclass

import torch

from benchmarks.disassemble import without_gpu
from benchmarks.implementations import LAYERS
from benchmarks.results import one_line
from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton.tuned_file import Kernel
from rlrr_kernels.tune import problem
from rlrr_kernels.tune.shapes import Shape

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Job:
    """One launch. ``choice``: which of the candidates of ``rlrr-tune``, 0 the heuristic's own."""

    kernel: Kernel
    shape: Shape
    dtype: str
    choice: int

    def __str__(self) -> str:
        s = self.shape
        return f"{self.kernel} M={s.m} N={s.n} K={s.k} groups={s.groups} {self.dtype}, choice {self.choice}"


def jobs(tokens: Sequence[int], layers: Sequence[str], dtypes: Sequence[str], candidates: int) -> list[Job]:
    """The heuristic's launch and up to ``candidates`` others of each kernel, what takes longest to compile first."""
    found = [
        Job(kernel, Shape(m, *LAYERS[layer]), dtype, choice)
        for choice in range(candidates + 1)
        for dtype, m, layer, kernel in itertools.product(dtypes, tokens, layers, problem.KERNELS)
    ]
    return sorted(found, key=lambda job: job.kernel != "grad_scales")


def compile_one(device: configs.Device, job: Job) -> str | None:
    """Compile a launch for a GPU; why it failed, or None."""
    dtype = getattr(torch, job.dtype)
    m, n, k, groups = job.shape.m, job.shape.n, job.shape.k, job.shape.groups

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        with without_gpu(device, []):
            task = problem.task_of(job.kernel, job.shape, dtype, dtype, device)
            choices = task.choices(device, job.choice)
            if job.choice < len(choices):  # there may be fewer
                x, weight, dy = empty(m, k, dtype=dtype), empty(n, k, dtype=dtype), empty(m, n, dtype=dtype)
                u, v = empty(n, 1), empty(groups, 1, k)
                tensors = problem.Tensors(x, weight, dy, u, v, empty(n, dtype=dtype), empty(n))
                problem.run(task, tensors, choices[job.choice])
    except Exception as error:  # whatever the compiler says of one launch, the others are compiled
        return f"{job}: {one_line(error)}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all compiled, 1 where one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_day.precompile", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--tokens", type=int, nargs="+", required=True, metavar="M")
    parser.add_argument("--layers", choices=LAYERS, nargs="+", default=list(LAYERS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bfloat16"])
    parser.add_argument("--candidates", type=int, default=0, help="of rlrr-tune, beside the heuristic's choice")
    parser.add_argument("--jobs", type=int, required=True, help="processes")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("precompile: no CUDA device is visible to torch", file=sys.stderr)
        return 2
    began = time.monotonic()
    todo = jobs(args.tokens, args.layers, args.dtype, args.candidates)
    failed = []
    try:
        with ProcessPoolExecutor(min(args.jobs, len(todo)), multiprocessing.get_context("spawn")) as pool:
            compile_here = functools.partial(compile_one, configs.cuda_device(0))
            failed = [why for why in pool.map(compile_here, todo) if why]
    except BrokenProcessPool as error:
        failed.append(f"the compiler ended its process: {error}")
    print("\n".join(failed))
    print(f"{len(todo)} launches compiled in {time.monotonic() - began:.0f} s, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
