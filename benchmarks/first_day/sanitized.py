"""One pass of a backend at tiny shapes for compute-sanitizer: ``python -m benchmarks.first_day.sanitized NAME PASS``.

Nothing but our kernels and copies runs on the GPU: what is right is computed on the CPU, as a BLAS under the tool takes
minutes and reports its own. ``NAME``: gluon, triton, cuda or hopper. Ends with status 1 where a value is wrong.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

import torch
from torch import Tensor

from benchmarks import implementations, results
from benchmarks.agreement import relative_error
from benchmarks.implementations import Inputs, make_inputs
from benchmarks.timing import Unavailable
from rlrr_kernels.backends import reference

NAMES = {"gluon": results.GLUON, "triton": results.TRITON, "cuda": results.CUDA, "hopper": results.CUDA_HOPPER}
PASSES = ("forward", "grad_input", "grad_scales")
#: M, N, K, groups: odd edges everywhere, groups that end within a tile, split sums, whole tiles and one row more.
SHAPES = ((33, 17, 19, 1), (70, 30, 72, 3), (130, 96, 136, 3), (16, 64, 1024, 1), (257, 264, 72, 1))
#: What Gluon's kernels take themselves: tiles for half of 132 multiprocessors, odd edges, whole groups of rows.
GLUON_SHAPES = ((1001, 1160, 136, 1), (1001, 1152, 136, 3))
#: Largest relative error; that values are right to the last bit is for the numeric tests.
LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-4}
GLUON_LIMITS = {torch.bfloat16: 0.02, torch.float16: 0.003}


def _run(module: ModuleType, which: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """A pass of ``module``, of x, W, u, v, b, f and dy."""
    x, w, u, v, b, f, dy = tensors
    arguments = {"forward": (x, w, u, v, b, f), "grad_input": (dy, w, u, v), "grad_scales": (dy, x, w, u, v, True)}
    got = getattr(module, which)(*arguments[which])
    return got if isinstance(got, tuple) else (got,)


def wrong(backend: str, which: str) -> list[str]:
    """What is wrong of a pass, one line each.

    Raises:
        Unavailable: the backend does not serve this GPU.
    """
    found = []
    gluon = backend == "gluon"
    for shape in GLUON_SHAPES if gluon else SHAPES:
        for dtype, limit in (GLUON_LIMITS if gluon else LIMITS).items():
            i: Inputs = make_inputs(*shape, dtype, "cpu")
            tensors = [t.detach() for t in (*i.arguments, i.dy)]
            there = [t.cuda() for t in tensors]
            implementations.served_by(NAMES[backend], there[0], there[1])
            with implementations.context(NAMES[backend])():
                got = _run(torch.ops.rlrr, which, there)
            off = relative_error([t.cpu() for t in got], _run(reference, which, [t.double() for t in tensors]))
            if not off <= limit:
                found.append(f"at {shape}, {dtype}: expected an error of {limit:g} at most, got {off:.3g}")
    return found


def main() -> int:
    """0; 1 where a value is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_day.sanitized")
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
