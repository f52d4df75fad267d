"""Which backend is fastest here, for ``auto`` to know: ``python -m benchmarks.choose``.

Times forward and backward of ViT-B/16's four linears, all together, on every
backend that serves the device, for each dtype and class of token counts; backends
take turns, and the fastest round of each counts. A class gets a rule where another
backend than the default wins by more than the noise; ``--write`` puts the device's
rules into ``rlrr_kernels/backends/measured.json`` and the times that show them into
``benchmarks/results/<device>/choice.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.implementations import LAYERS, fused, make_inputs, step
from benchmarks.results import device_name, results_folder
from benchmarks.timing import seconds
from rlrr_kernels import use_backend
from rlrr_kernels.backends import choice

#: First and last M of a class, and the M that stands for it.
CLASSES = ((1, 15, 4), (16, 127, 64), (128, 1023, 394), (1024, None, 3152))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MARGIN = 1.05
ROOT = Path(__file__).parents[1]


def measure(dtype: torch.dtype, tokens: int, device: str, rounds: int) -> dict[str, float]:
    """Backend -> seconds of the fastest round, over all four layers; nothing is timed where only one serves."""
    layers = [make_inputs(tokens, n, k, groups, dtype, device) for n, k, groups in LAYERS.values()]
    one = layers[0]
    names = [name for name in choice.BACKENDS if choice.refusal(name, one.x, one.weight) is None]

    def run() -> None:
        for inputs in layers:
            step(inputs, fused)

    best = dict.fromkeys(names, float("inf"))
    for turn in range(rounds + 1 if len(names) > 1 else 0):  # the first warms up
        for name in names:
            with use_backend(name):
                spent = seconds(run)
            if turn:
                best[name] = min(best[name], spent)
    return best


def rules(results: list[dict[str, Any]], device: str, source: str) -> list[dict[str, Any]]:
    """Where another backend than the default won by more than the margin."""
    found = []
    for r in results:
        default = next(name for name, (_, kinds) in choice.BACKENDS.items() if r["kind"] in kinds and name in r["best"])
        winner = min(r["best"], key=r["best"].__getitem__)
        if r["best"][default] > MARGIN * r["best"][winner]:
            rule = {"device": device, "dtype": r["dtype"], "tokens": r["tokens"], "backend": winner, "source": source}
            found.append(rule)
    return found


def _save(folder: Path, command: str, results: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "choice.json").write_text(json.dumps({"command": command, "results": results}, indent=1) + "\n")


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", choices=names, nargs="+", default=names)
    tokens_of = [tokens for *_, tokens in CLASSES]
    parser.add_argument(
        "--tokens", type=int, choices=tokens_of, nargs="+", default=tokens_of, help="what stands for a class"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--write", action="store_true", help="change measured.json for this device")
    where.add_argument("--out", type=Path, metavar="FOLDER", help="write the times to FOLDER/choice.json as they come")
    args = parser.parse_args()
    command = " ".join(["python -m benchmarks.choose", *sys.argv[1:]])
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_name()
    results = []
    for dtype, name in tqdm([pair for pair in zip(DTYPES, names, strict=True) if pair[1] in args.dtype], leave=False):
        for first, last, tokens in CLASSES:
            if tokens not in args.tokens:
                continue
            best = measure(dtype, tokens, kind, args.rounds)
            if len(best) < 2:
                tqdm.write(f"{name:<9} M = {tokens:<5} {next(iter(best))} alone serves it")
                continue
            results.append({"kind": kind, "dtype": name, "tokens": [first, last], "M": tokens, "best": best})
            fastest = min(best.values())
            ratios = ", ".join(f"{b} {t / fastest:.2f}" for b, t in sorted(best.items(), key=lambda item: item[1]))
            tqdm.write(f"{name:<9} M = {tokens:<5} {ratios}")
            if args.out:
                _save(args.out, command, results)
    folder = results_folder()
    found = rules(results, device, str((folder / "choice.json").relative_to(ROOT)))
    print(json.dumps(found, indent=1))
    if args.write:
        _save(folder, command, results)
        path = Path(choice.__file__).parent / "measured.json"
        others = [rule for rule in json.loads(path.read_text()) if rule["device"] != device]
        path.write_text(json.dumps(others + found, indent=1) + "\n")


if __name__ == "__main__":
    main()
