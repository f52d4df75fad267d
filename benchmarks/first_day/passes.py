"""Each pass of each backend beside BLAS's bare product: ``python -m benchmarks.first_day.passes LAYER --out FILE``.

The first figures of a day: forward, grad_input and grad_scales alone, in bfloat16, at ViT-B/16's shapes. All of the
suites' rivals would take ten minutes a layer; these take one for all batch sizes.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import implementations, results, timing
from benchmarks.implementations import LAYERS, TOKENS, Inputs, make_inputs
from benchmarks.timing import Call, Variant
from rlrr_kernels.ops import linear

BLAS = "BLAS"
NAMES = (results.GLUON, results.TRITON, results.CUDA, results.CUDA_HOPPER)


def _forward(i: Inputs) -> Tensor:
    return linear.forward(*(t.detach() for t in i.arguments))


def _grad_input(i: Inputs) -> Tensor:
    return linear.grad_input(i.dy, i.weight, i.scale_out.detach(), i.scale_in.detach())


def _grad_scales(i: Inputs) -> tuple[Tensor, ...]:
    return linear.grad_scales(i.dy, i.x.detach(), i.weight, i.scale_out.detach(), i.scale_in.detach(), True)


#: Pass -> ours, and the product without rescaling and reductions.
PASSES: dict[str, tuple[Callable[[Inputs], Any], Callable[[Inputs], Any]]] = {
    "forward": (_forward, lambda i: F.linear(i.x.detach(), i.weight, i.bias)),
    "grad_input": (_grad_input, lambda i: i.dy @ i.weight),
    "grad_scales": (_grad_scales, lambda i: i.dy.mT @ i.x.detach()),
}


def measure(layer: str, images: int, which: str, rounds: tuple[int, int]) -> dict[str, Any]:
    """One pass of a layer on each backend and on BLAS, in turns: sizes, seconds a round, and what failed."""
    n, k, groups = LAYERS[layer]
    m = TOKENS * images
    make = functools.partial(make_inputs, m, n, k, groups, torch.bfloat16, "cuda")
    first = make()
    count = min(16, timing.copies(first.nbytes, timing.l2_bytes()))
    inputs = [first, *(make(seed=seed) for seed in range(1, count))]
    ours, blas = PASSES[which]

    def variant(name: str) -> Variant:
        implementations.served_by(name, first.x, first.weight)
        run = blas if name == BLAS else ours
        return Variant([Call(functools.partial(run, i)) for i in inputs], implementations.context(name))

    makers = {name: functools.partial(variant, name) for name in (BLAS, *NAMES)}
    found = timing.interleaved(makers, timing.device_clock(), 0.4, rounds, warm_seconds=0.15)
    return {
        **{"device": results.device_name(), "layer": layer, "m": m, "n": n, "k": k, "groups": groups, "pass": which},
        "clock": next((rival.clock for rival in found.values() if rival.clock), None),
        "copies": len(inputs),
        "seconds": {name: rival.seconds for name, rival in found.items() if rival.seconds},
        "errors": {name: rival.error for name, rival in found.items() if rival.error},
    }


def table(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each layer, M and pass: BLAS's time and rate, then its time over ours: above 1 ours is faster."""
    said = []
    for row in rows:
        medians = {name: statistics.median(seconds) for name, seconds in row["seconds"].items()}
        blas = medians.get(BLAS)
        cells = [f"{row['layer']:<5} M = {row['m']:<6,} {row['pass']:<12}"]
        if blas is None:
            cells.append(f"BLAS failed: {row['errors'].get(BLAS, '')}")
        else:
            rate = 2 * row["m"] * row["n"] * row["k"] / blas / 1e12
            cells.append(f"BLAS {blas * 1e6:.0f} us, {rate:.0f} TFLOP/s; BLAS / ours:")
        for name in NAMES:
            short = name.partition("/")[2]
            if blas is not None and name in medians:
                cells.append(f"{short} {blas / medians[name]:.2f}")
            elif name in row["errors"]:
                cells.append(f"{short} failed: {row['errors'][name][:40]}")
        cells += [f"[{row['clock']}]"] if row["clock"] != results.GRAPH else []
        said.append(" ".join(cells))
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a backend failed, 2 without a GPU, 3 where the GPU takes no more work."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_day.passes")
    parser.add_argument("layer", choices=LAYERS)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 256, 1])
    parser.add_argument("--rounds", type=int, nargs=2, default=(7, 40), metavar=("LEAST", "MOST"))
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON is added for each pass")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("passes: no CUDA device is visible to torch", file=sys.stderr)
        return 2
    failed = False
    for images in args.images:
        for which in PASSES:
            row = measure(args.layer, images, which, tuple(args.rounds))
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*table([row]), flush=True)
            failed |= bool(row["errors"])
            fault = timing.gpu_fault()
            if fault is not None:
                print(f"the GPU failed: {fault}", flush=True)
                return 3
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
