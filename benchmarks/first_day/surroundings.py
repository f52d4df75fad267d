"""What this machine has, and its ceilings: ``python -m benchmarks.first_day.surroundings``.

With ``--library`` only whether the CUDA library serves the GPU here, as the exit status too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import timing
from rlrr_kernels.backends import choice
from rlrr_kernels.backends.triton import choose

PACKAGES = ("torch", "triton", "numpy", "timm", "peft", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis")
PROGRAMS = ("nvcc", "g++", "make", "git", "compute-sanitizer", "nvidia-smi")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def surroundings() -> list[str]:
    """The GPU, Python, packages, and what is missing."""
    device = torch.cuda.get_device_properties(0)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    missing += [] if header.exists() else ["Python.h (Triton compiles its launcher with it)"]
    return [
        f"{device.name}, {device.multi_processor_count} multiprocessors, L2 {device.L2_cache_size >> 20} MiB; "
        f"the launchers see {choose.cuda_device(0)}",
        f"Python {platform.python_version()}, {os.cpu_count()} cores; "
        + ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        f"missing: {', '.join(missing) or 'nothing'}",
    ]


def ceilings(size: int) -> str:
    """What BLAS's products of ``size`` and a copy reach here, by CUDA graphs or events."""
    half = [torch.randn(size, size, device="cuda").bfloat16() for _ in range(2)]
    single = torch.randn(size, size, device="cuda")
    source = torch.zeros(4 * size**2, device="cuda")
    target = torch.empty_like(source)
    flops = 2 * size**3 / 1e12
    bf16, copy = _seconds(lambda: half[0] @ half[1]), _seconds(lambda: target.copy_(source))
    fp32 = _seconds(lambda: single @ single)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    tf32 = _seconds(lambda: single @ single)
    return (
        f"ceilings: products of {size}: bfloat16 {flops / bf16:.0f}, TF32 {flops / tf32:.0f}, float32 "
        f"{flops / fp32:.0f} TFLOP/s; a copy {2 * source.nbytes / copy / 1e12:.2f} TB/s"
    )


def _seconds(call: Callable[[], object]) -> float:
    turn = timing.GraphClock()(timing.Variant([timing.Call(call)]))
    return statistics.median(turn() for _ in range(7))


def library() -> str | None:
    """Why the CUDA library does not serve the GPU here, or None."""
    x = torch.zeros(2, 2, device="cuda")
    return choice.refusal("cuda", x, x)


def main() -> int:
    """0, or 1 without a GPU or, when asked for it, without a CUDA library for it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_day.surroundings")
    parser.add_argument("--library", action="store_true")
    parser.add_argument("--size", type=int, default=8192, help="of the products, rows and columns")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is visible to torch")
        return 1
    why = library()
    print(f"CUDA library: {'serves; ' + choice.load('cuda').build() if why is None else why}")  # type: ignore[union-attr]
    if args.library:
        major, minor = torch.cuda.get_device_capability()
        print(f"architecture {major}.{minor}{'a' if major >= 9 else ''}")
        return int(why is not None)
    for line in surroundings():
        print(line)
    print(ceilings(args.size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
