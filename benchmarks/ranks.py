"""Ranks above 1 on a CPU, in turns with PEFT's HiRA: ``python -m benchmarks.ranks`` (about two minutes).

Both compute y = x (W * (1 + u v))^T. HiRA forms W * (u v) whole, and adds the product with it to that with W. Forward
and backward of ViT-B/16's four linears, without groups; the table has the ratios of the least times and of the memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import results, timing
from benchmarks.implementations import LAYERS, TOKENS, Inputs, Layer, make_inputs, peft_layer
from benchmarks.measures import peak_extra_bytes
from benchmarks.tables import markdown
from benchmarks.timing import Call, Variant
from rlrr_kernels import rescaled_linear


def ours(i: Inputs, rank: int) -> Layer:
    """Return this package's layer with scales of a rank on these inputs."""
    n, k = i.weight.shape
    u, v = torch.randn(n, rank, requires_grad=True), torch.randn(rank, k).mul_(k**-0.5).requires_grad_()
    return Layer(lambda: rescaled_linear(i.x, i.weight, u, v, i.bias), (i.x, u, v), (i.weight, i.bias))


def both(layer: Layer, dy: Tensor) -> Call:
    """Return forward and backward of a layer."""

    def run() -> tuple[Tensor, ...]:
        y = layer.forward()
        return (y.detach(), *torch.autograd.grad(y, layer.trained, dy))

    return Call(run)


def measure(m: int, n: int, k: int, rank: int, dtype: torch.dtype, rounds: tuple[int, int]) -> tuple[float, float]:
    """Return HiRA's least time over ours, and our extra memory over HiRA's."""
    i = make_inputs(m, n, k, 1, dtype, "cpu")
    calls = [both(layer, i.dy) for layer in (ours(i, rank), peft_layer(results.HIRA, i, rank))]
    found = timing.interleaved(
        {str(at): lambda call=call: Variant([call]) for at, call in enumerate(calls)},  # type: ignore[misc]
        timing.WallClock(),
        timing.BUDGET["cpu"],
        rounds,
        warm_seconds=0.3,
    )
    for of in found.values():
        if of.error is not None:
            raise RuntimeError(of.error)
    least = [min(of.seconds) for of in found.values()]
    memory = [peak_extra_bytes(call.run) for call in calls]
    return least[1] / least[0], memory[0] / memory[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table and the geometric mean."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows, logarithms = [], []
    for dtype in options.dtype:
        for images in options.images:
            for layer in options.layers:
                row = [dtype, layer, f"{images * TOKENS:,}"]
                for rank in options.ranks:
                    case = (images * TOKENS, *LAYERS[layer][:2], rank, getattr(torch, dtype))
                    times, memory = measure(*case, (3, options.rounds))
                    logarithms.append(math.log(times))
                    row += [f"{times:.2f}", f"{memory:.1%}"]
                rows.append(row)
    heads = [head for r in options.ranks for head in (f"HiRA / ours, r = {r}", "extra memory, ours / HiRA")]
    print(markdown(["dtype", "layer", "M", *heads], rows, left=2))
    print(f"geometric mean {math.exp(sum(logarithms) / len(logarithms)):.2f}")


if __name__ == "__main__":
    main()
