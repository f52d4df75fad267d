"""The layer, forward and backward, against the formula and its best rewriting: ``python -m benchmarks.compare``.

"Bare products" are the three matrix products of the layer by the vendor's BLAS, with
W as it is, nothing rescaled, reduced or recorded: formula / bare products is where
formula / ours would stand if all of that cost nothing. "Our ops" are the package's
three ops without the module, validation and autograd around them.

The implementations take turns within each round, and the fastest round of each
counts: what else a shared machine does then hits all of them alike. Prints a
Markdown table of ratios and writes every time, with versions and the command, to
``benchmarks/results/<device>/layers.json``.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.implementations import IMPLEMENTATIONS, LAYERS, TOKENS, make_inputs, products, step, three_ops
from benchmarks.memory import peak_extra_bytes
from rlrr_kernels import backend_for, info

PEERS = ("formula", "recompute")
OURS = "rlrr_kernels"
OPS, LIMIT = "our three ops", "bare products"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(call: Callable[[], Any], device: str) -> float:
    """Of one call, the GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(layer: str, tokens: int, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Seconds of each round and peak extra bytes of each implementation at one layer."""
    n, k, groups = LAYERS[layer]
    inputs = make_inputs(tokens, n, k, groups, DTYPES[dtype], device)
    calls = {name: functools.partial(step, inputs, IMPLEMENTATIONS[name]) for name in (OURS, *PEERS)}
    calls[OPS] = functools.partial(three_ops, inputs)
    calls[LIMIT] = functools.partial(products, inputs)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            spent = seconds(call, device)
            if turn:
                times[name].append(round(spent, 6))
    extra = {name: peak_extra_bytes(call) for name, call in calls.items()}
    served = backend_for(inputs.x, inputs.weight)
    return {
        "layer": layer,
        "tokens": tokens,
        "dtype": dtype,
        "backend": served,
        "seconds": times,
        "extra_bytes": extra,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Ratios of the fastest rounds, and of peak extra memory, as Markdown."""
    heads = ["layer", "M", "dtype", *(f"{name} / ours" for name in PEERS), "formula / products", "our ops / ours"]
    heads.append("extra memory, ours / formula")
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | --- |" + " ---: |" * (len(heads) - 3)]
    for r in results:
        best = {name: min(times) for name, times in r["seconds"].items()}
        ratios = " | ".join(f"{best[name] / best[OURS]:.2f}" for name in PEERS)
        limit, ops = best["formula"] / best[LIMIT], best[OPS] / best[OURS]
        memory = r["extra_bytes"][OURS] / r["extra_bytes"]["formula"]
        lines.append(
            f"| {r['layer']} | {r['tokens']} | {r['dtype']} | {ratios} | {limit:.2f} | {ops:.2f} | {memory:.1%} |"
        )
    return "\n".join(lines)


def results_folder() -> Path:
    """Where the results of this device are kept."""
    name = torch.cuda.get_device_name().replace(" ", "_") if torch.cuda.is_available() else "cpu"
    return Path(__file__).parent / "results" / name


def as_json(command: str, report: list[str], results: list[dict[str, Any]]) -> str:
    """A line for each result, so that two runs can be told apart by eye."""
    lines = ",\n  ".join(json.dumps(r) for r in results)
    head = f'"command": {json.dumps(command)},\n "info": {json.dumps(report, indent=2)}'
    return f'{{{head},\n "results": [\n  {lines}\n ]}}\n'


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1, 32], help="batch sizes, of 197 tokens each")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=25, help="at one image; a fifth of it from eight images on")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/layers.json")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [(layer, i, dtype) for i in args.images for dtype in args.dtype for layer in LAYERS]
    results = [
        measure(layer, TOKENS * i, dtype, device, args.rounds if i < 8 else max(args.rounds // 5, 3))
        for layer, i, dtype in tqdm(cases, leave=False)
    ]
    print(table(results))
    out = args.out or results_folder() / "layers.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python -m benchmarks.compare", *sys.argv[1:]])
    out.write_text(as_json(command, list(info.lines()), results))
    print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
