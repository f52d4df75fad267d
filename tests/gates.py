"""What must hold for every compiled Hopper kernel before it may be launched, read from its code: ``make gates``.

``python -m tests.gates VERSION...`` compiles the tiles of the plain kernels and all forms of the Gluon kernels with
each VERSION of Triton. It prints a line for each pass: how many kernels have a hazard (``hazards.py``), spill, or
need more shared memory than there is, and for Gluon the numbers of instructions (``gluon_code.py``). It exits with 1
if one fails.

Each VERSION is installed into ``build/triton``. It need not fit the installed PyTorch, as nothing is launched. This
takes about ten minutes for each VERSION on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.disassemble import as_case, probe
from rlrr_kernels.backends.problem import Pass, Problem
from rlrr_kernels.backends.triton import choose
from rlrr_kernels.backends.triton.choose import Device
from rlrr_kernels.backends.triton.gluon.launch import WIDTHS
from tests.gluon_code import disorder, figures
from tests.hazards import hazards
from tests.sass import parsed

H100 = Device((9, 0), 132, 232_448)
ROOT = Path(__file__).parents[1]

#: A warp's instructions in a step of one product, and in one of two, whose W' Triton 3.9 copies for the second. A step
#: of 256 tokens takes 1,024 cycles of the tensor cores, of 192 tokens 768, and a scheduler serves two warps meanwhile.
MOST_STEP, MOST_STEP_OF_TWO = 190, 240
#: From the last product of a tile to the next tile.
MOST_AFTER = 250

#: Sizes that every tile divides, and sizes that no tile divides.
WHOLE, ODD = {"m": 6400, "n": 2304, "k": 768}, {"m": 6301, "n": 2319, "k": 783}

#: (arithmetic, dtype of x, dtype of W)
TYPES = (
    ("half", "bfloat16", "bfloat16"),
    ("half", "float16", "float16"),
    ("half", "bfloat16", "float32"),
    ("tf32", "float32", "float32"),
    ("ieee", "float32", "float32"),
)


def plain_cases(kernel: Pass) -> Iterator[dict[str, Any]]:
    """Every tile of the plain kernels on Hopper; the first also with a split sum, and with several groups."""
    for (kind, dtype, weight_dtype), aligned in itertools.product(TYPES, (True, False)):
        sizes = WHOLE if aligned else ODD
        types = {"dtype": getattr(torch, dtype), "weight_dtype": getattr(torch, weight_dtype)}
        problem = Problem(kernel, **sizes, groups=1, **types, tf32=kind == "tf32")
        tiles = choose.tiles(problem, H100, aligned)
        names = {"dtype": dtype, "weight_dtype": weight_dtype, "sass": True}
        for tile, groups in ((tiles[0], 3), (replace(tiles[0], splits=2), 1), *((tile, 1) for tile in tiles)):
            yield as_case(kernel, kind, tile, **sizes, groups=groups, **names)


def gluon_cases(kernel: Pass) -> Iterator[dict[str, Any]]:
    """Every form of a Gluon kernel: widths, dtypes, one group and several."""
    widths = WIDTHS if kernel != "grad_scales" else (None,)
    for width, dtype, groups in itertools.product(widths, ("bfloat16", "float16"), (1, 3)):
        types = {"dtype": dtype, "weight_dtype": dtype, "sass": True}
        yield as_case(kernel, "half", width, backend="gluon", **WHOLE, groups=groups, **types)


CASES = {"triton": plain_cases, "gluon": gluon_cases}


def of_gluon(report: dict[str, Any]) -> bool:
    """Whether a report is about a Gluon kernel, not one that adds partial sums."""
    return report["name"] in ("product_kernel", "gram_kernel")


def wrong(report: dict[str, Any], device: Device) -> list[str]:
    """Why a compiled kernel may not be launched; the machine code is read if the report has it."""
    found = []
    if report["stack"]:
        found.append(f"spills {report['stack']} bytes")
    if report["shared"] > device.shared_memory:
        found.append(f"takes {report['shared']} of {device.shared_memory} bytes of shared memory")
    if "sass" in report:
        lines = parsed(report["sass"])[report["name"]]
        found += [f"hazard: {hazard}" for hazard in hazards(lines)]
        if of_gluon(report):
            found += _wrong_in_gluon(report, lines)
    return found


def _wrong_in_gluon(report: dict[str, Any], lines: list[str]) -> Iterator[str]:
    yield from disorder(lines)
    code = figures(lines)
    two = report["case"].get("choice", {}).get("extra", 0) > 0
    if code.step > (most := MOST_STEP_OF_TWO if two else MOST_STEP):
        yield f"takes {code.step} instructions a step, expected {most} at most"
    if code.after > MOST_AFTER:
        yield f"takes {code.after} instructions after a tile's last product, expected {MOST_AFTER} at most"
    if code.block_barriers:
        yield f"waits {code.block_barriers} times a step for the whole block"


def compiled(python: str, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reports on all cases for Hopper, from two processes of an interpreter."""
    requests = [{"device": dataclasses.asdict(H100), "cases": part} for part in (wanted[::2], wanted[1::2]) if part]
    with ThreadPoolExecutor(2) as pool:
        return [report for half in pool.map(lambda r: probe(r, python), requests) for report in half]


def _range(values: list[int]) -> str:
    return f"{min(values)} to {max(values)}" if min(values) < max(values) else str(values[0])


def cells(reports: list[dict[str, Any]], failed: list[list[str]]) -> tuple[Any, ...]:
    """The cells of a line: compiled, wrong, hazards, registers, shared memory, and :class:`Figures` of Gluon's code."""
    hazardous = sum(any(line.startswith("hazard") for line in lines) for lines in failed)
    shared = max(report["shared"] for report in reports)
    found = len(reports), sum(map(bool, failed)), hazardous, max(r["registers"] for r in reports), shared
    codes = [figures(parsed(r["sass"])[r["name"]]) for r in reports if of_gluon(r)]
    if not codes:
        return (*found, "", "", "", "")
    barriers = "; ".join(dict.fromkeys(f"{code.barriers[0]}, {code.barriers[1]}" for code in codes))
    steps = (_range([code.step for code in codes]), _range([code.longest for code in codes]))
    return (*found, *steps, _range([code.after for code in codes]), barriers)


def triton_version(python: str) -> str:
    """The version of Triton that an interpreter imports."""
    question = "import triton; print(triton.__version__)"
    return subprocess.run([python, "-c", question], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def interpreter(version: str, folder: Path) -> str:
    """A script that runs this Python with another Triton, installed into ``folder`` if it is not there."""
    target = folder / version
    if version == "newest" or not (target / "triton").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(target)]
        subprocess.run([*command, "triton" if version == "newest" else f"triton=={version}"], check=True)
    script = target / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{target}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def main() -> int:
    """Print the table; returns 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("version", nargs="*", help="of Triton, or newest; default: the installed one")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "triton", help="default: build/triton")
    parser.add_argument("--backend", choices=CASES, action="append", help="default: all")
    arguments = parser.parse_args()
    bad = False
    heads = ("Triton", "backend", "pass", "compiled", "wrong", "hazards", "registers", "shared memory")
    heads = (*heads, "a step", "the longest", "after a tile", "barriers in, after")
    print(f"| {' | '.join(heads)} |\n| --- | --- | --- |{' ---: |' * (len(heads) - 3)}")
    for version in arguments.version or ["installed"]:
        python = sys.executable if version == "installed" else interpreter(version, arguments.folder)
        name = f"{triton_version(python)}{f' ({version})' if version.isalpha() else ''}"
        for backend, kernel in itertools.product(arguments.backend or CASES, get_args(Pass)):
            reports = compiled(python, list(CASES[backend](kernel)))
            failed = [wrong(report, H100) for report in reports]
            bad |= any(failed)
            print(f"| {' | '.join(map(str, (name, backend, kernel, *cells(reports, failed))))} |", flush=True)
            for report, lines in zip(reports, failed, strict=True):
                for line in lines:
                    print(f"    {report['case']}: {line}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
