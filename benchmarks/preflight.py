"""Whether a backend computes anything right on this GPU, before it is timed: ``python -m benchmarks.preflight NAME``.

Each backend runs in a process of its own with a time limit: a kernel that hangs, or that makes the GPU refuse all
later work, then costs its own rivals and nobody else's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks import implementations, results
from benchmarks.agreement import relative_error
from benchmarks.implementations import make_inputs
from benchmarks.timing import Unavailable
from rlrr_kernels import ops, reference

#: M, N, K and groups: blocks that tiles fill, odd edges everywhere, one token.
SHAPES = ((256, 384, 128, 3), (37, 51, 45, 3), (1, 64, 72, 1))
#: Largest relative error against float64; above TF32's for float32.
LIMITS = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 0.005}
NAMES = (results.TRITON, results.CUDA, results.CUDA_HOPPER)
SECONDS = 300.0
PASSES = ("forward", "grad_input", "grad_scales")


def check(name: str, device: str) -> None:
    """Run the three passes of an implementation of ours at small shapes.

    Raises:
        Unavailable: its backend cannot serve tensors of this device.
        ValueError: a pass is off.
    """
    for dtype, limit in LIMITS.items():
        for m, n, k, groups in SHAPES:
            i = make_inputs(m, n, k, groups, dtype, device)
            implementations.served_by(name, i.x, i.weight)
            x, w, u, v, b, f, dy = (t.detach() for t in (*i.arguments, i.dy))
            wide = x, w, u, v, b, f, dy
            exact = _passes(reference, *(t.double() for t in wide))
            with implementations.context(name)():
                found = _passes(ops, *wide)
            for which, got, want in zip(PASSES, found, exact, strict=True):
                error = relative_error(got, want)
                if not error <= limit:
                    where = f"{which} at M {m}, N {n}, K {k}, groups {groups}, {str(dtype).removeprefix('torch.')}"
                    raise ValueError(f"{where}: expected a relative error of {limit:g} at most, got {error:.3g}")


def _passes(module: object, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    x, w, u, v, b, f, dy = tensors
    calls = {"forward": (x, w, u, v, b, f), "grad_input": (dy, w, u, v), "grad_scales": (dy, x, w, u, v, True)}
    found = (getattr(module, which)(*calls[which]) for which in PASSES)
    return [got if isinstance(got, tuple) else (got,) for got in found]


def failures(
    names: Sequence[str] = NAMES,
    command: Callable[[str], list[str]] = lambda name: [sys.executable, "-m", "benchmarks.preflight", name],
    seconds: float = SECONDS,
) -> dict[str, str]:
    """Implementations that must not be timed -> why; each is tried in a process of its own."""
    found = {}
    for name in names:
        try:
            done = subprocess.run(command(name), cwd=results.ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            found[name] = f"no answer within {seconds:g} s"
            continue
        if done.returncode != 0:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            said = lines[-1][:250] if lines else "it said nothing"
            found[name] = f"signal {-done.returncode}: {said}" if done.returncode < 0 else said
    return found


def main(arguments: Sequence[str]) -> int:
    """0 where the backend is right or not for this GPU, 1 where it is wrong, 2 for a bad argument or without a GPU."""
    if len(arguments) != 1 or arguments[0] not in NAMES:
        print(f"benchmarks.preflight: expected one of {', '.join(NAMES)}, got {' '.join(arguments)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks.preflight: no CUDA device is visible to torch", file=sys.stderr)
        return 2
    try:
        check(arguments[0], "cuda")
        torch.cuda.synchronize()
    except Unavailable as reason:  # not a failure: the suites leave it out
        print(reason)
    except Exception as error:  # whatever a kernel does wrong is the answer
        print(results.one_line(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
