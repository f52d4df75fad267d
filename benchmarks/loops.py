"""The kernels' hot loops, counted from their machine code: ``python -m benchmarks.loops``.

One warp and one step (64 of the depth on Hopper and Blackwell, 32 on Ampere), bfloat16
throughout, tiles of the aligned path. ``serialised`` says that each wgmma is
waited for before the next is started: the tensor cores then idle while W' is formed.
``--python`` compiles by another interpreter's Triton. Needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.disassemble import as_case, probe
from benchmarks.instructions import unpredicated
from rlrr_kernels.backends.triton.config import Config, Device

GPUS = {
    "sm_80": Device((8, 0), 108, 166_912),
    "sm_90": Device((9, 0), 132, 232_448),
    "sm_100": Device((10, 0), 148, 232_448),
}

#: architecture, kernel, tile
LOOPS = (
    ("sm_90", "forward", Config(256, 128, 64, 8, 3)),
    ("sm_90", "forward", Config(128, 128, 64, 4, 3)),
    ("sm_90", "forward", Config(128, 64, 64, 4, 4)),
    ("sm_90", "grad_input", Config(256, 64, 128, 8, 3)),
    ("sm_90", "grad_input", Config(128, 64, 128, 4, 3)),
    ("sm_90", "grad_scales", Config(64, 128, 256, 8, 3)),
    ("sm_80", "forward", Config(128, 128, 32, 8, 4)),
    ("sm_80", "grad_input", Config(128, 32, 128, 8, 4)),
    ("sm_80", "grad_scales", Config(32, 128, 128, 8, 4)),
    ("sm_100", "forward", Config(256, 128, 64, 8, 3)),
)

#: What W' costs: widened, scaled, rounded to pairs.
RESCALE = ("FFMA", "FMUL", "PRMT", "LOP3", "SHF", "F2FP")


def serialised(loop: Sequence[str]) -> bool:
    """Whether a wait inside the loop leaves no wgmma under way."""
    return any(re.search(r"WARPGROUP\.DEPBAR\S* gsb0, 0x0", text) for text in loop)


def names(loop: Sequence[str]) -> list[str]:
    """What each instruction does, without its predicate and its modifiers."""
    return [unpredicated(text).split()[0].split(".")[0] for text in loop]


def measure(architecture: str, cases: Sequence[tuple[str, Config]], python: str) -> list[dict[str, Any]]:
    """A report for each (kernel, tile), the first kernel that its launch starts."""
    path = "vectors" if architecture == "sm_80" else "boxes"
    request = []
    for kernel, config in cases:
        split = {"split_tokens": 4 * config.block_m} if kernel == "grad_scales" else {}
        shape = {"m": 6304, "n": 2304, "k": 768, "groups": 1}
        types = {"dtype": "bfloat16", "weight_dtype": "bfloat16"}
        request.append(as_case(kernel, "half", config, path=path, disassemble=True, **types, **shape, **split))
    reports = probe({"device": dataclasses.asdict(GPUS[architecture]), "cases": request}, python)
    first = {report["index"]: report for report in reversed(reports)}
    return [first[index] for index in range(len(request))]


def main() -> None:
    """Compile, count and print a Markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loops", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="interpreter whose Triton compiles")
    args = parser.parse_args()
    heads = ("GPU", "kernel", "tile", "warps", "registers", "instructions", *RESCALE, "barriers", "serialised")
    print(f"| {' | '.join(heads)} |\n| --- | --- | --- |{' ---: |' * (len(heads) - 4)} --- |")
    for architecture in GPUS:
        cases = [(kernel, config) for arch, kernel, config in LOOPS if arch == architecture]
        for (kernel, c), report in zip(cases, measure(architecture, cases, args.python), strict=True):
            found = names(report["loop"])
            counts = [sum(name in (kind, f"{kind}2") for name in found) for kind in RESCALE]
            row = [
                *(architecture, kernel, f"{c.block_m} x {c.block_n} x {c.block_k}", c.num_warps),
                *(report["registers"], len(found), *counts, found.count("BAR")),
                "yes" if serialised(report["loop"]) else "no",
            ]
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
