"""One pass of a backend at tiny shapes, for compute-sanitizer: ``python -m tests.sanitized BACKEND PASS``.

Nothing but our kernels and copies runs on the GPU: what is right is computed on the CPU, as a BLAS under the tool takes
minutes and reports its own. ``BACKEND``: triton, cuda or hopper. Ends with status 1 where a value is wrong.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from benchmarks import implementations, results
from benchmarks.agreement import relative_error
from benchmarks.timing import Unavailable
from rlrr_kernels import ops
from tests.oracle import differentiate, make_problem

NAMES = {"triton": results.TRITON, "cuda": results.CUDA, "hopper": results.CUDA_HOPPER}
#: M, N, K, groups: odd edges everywhere, groups that end within a tile, split sums, whole tiles and one row more.
SHAPES = ((33, 17, 19, 1), (70, 30, 72, 3), (130, 96, 136, 3), (16, 64, 1024, 1), (257, 264, 72, 1))
#: Pass -> the fields of a Problem that it takes, and those of an Answer that it gives.
PASSES = {
    "forward": (("x", "weight", "scale_out", "scale_in", "bias", "shift"), ("y",)),
    "grad_input": (("dy", "weight", "scale_out", "scale_in"), ("dx",)),
    "grad_scales": (("dy", "x", "weight", "scale_out", "scale_in"), ("du", "dv", "df")),
}
#: Largest relative error; that values are right to the last bit is for the numeric tests.
LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-4}


def wrong(backend: str, which: str) -> list[str]:
    """What is wrong of a pass, one line each.

    Raises:
        Unavailable: the backend does not serve this GPU.
    """
    names, fields = PASSES[which]
    found = []
    for shape in SHAPES:
        for dtype, limit in LIMITS.items():
            p = make_problem(*shape, dtype)
            exact = differentiate(p, torch.float64)
            args: list[Any] = [getattr(p, name).cuda() for name in names]
            implementations.served_by(NAMES[backend], args[0], args[names.index("weight")])
            with implementations.context(NAMES[backend])():
                got = getattr(ops, which)(*args, *((True,) if which == "grad_scales" else ()))
            for field, value in zip(fields, got if isinstance(got, tuple) else (got,), strict=True):
                off = relative_error([value.cpu()], [getattr(exact, field)])
                if not off <= limit:
                    found.append(f"{field} at {shape}, {dtype}: expected an error of {limit:g} at most, got {off:.3g}")
    return found


def main() -> int:
    """0; 1 where a value is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.sanitized")
    parser.add_argument("backend", choices=NAMES)
    parser.add_argument("which", choices=PASSES, metavar="pass")
    args = parser.parse_args()
    try:
        found = wrong(args.backend, args.which)
    except Unavailable as reason:
        print(f"not here: {reason}")
        return 0
    print("\n".join(found))
    print(f"values wrong: {len(found)}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
