"""What must hold of every compiled kernel before it may be launched, read from its code: ``make gates``.

For each Triton asked for, ``python -m tests.gates VERSION...`` compiles every tile that the package would launch with
it on Hopper and prints a line: how many have a hazard (``hazards.py``), spill, want more shared memory than there is,
or have boxes where the copy engine cannot put them. It does the same for W' in registers, which says what belongs in
``backends/triton/compiler.py``. The exit status is 1 if a kernel that would be launched fails, or if a Triton that is
listed there is not clean.

Each VERSION is installed into ``build/triton`` first, beside PyTorch, which it need not fit: nothing is launched.
It takes about ten minutes a VERSION on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from benchmarks.disassemble import probe
from benchmarks.search import compile_cases, triton_version
from benchmarks.search_space import TARGETS, Row, rows
from rlrr_kernels.backends.triton.config import Config, Device, Kernel, fitting_tiles
from tests.hazards import hazards, products
from tests.sass import parsed

#: Where the copy engine may begin: each stage of a box, so their sizes too.
BOX_BYTES = 128
ROOT = Path(__file__).parents[1]


def tiles(architecture: str, kernel: str, row: Row) -> list[Config]:
    """Every tile of a row of the table, and the first once more with its sum split."""
    device = TARGETS[architecture]
    found = fitting_tiles(kernel, row.kind, row.path, row.x_size, row.weight_size, device)  # type: ignore[arg-type]
    configs = [tile.config() for tile in dict.fromkeys(found)]
    return configs if kernel == "grad_scales" else [*configs, found[0].config(splits=2)]


def cases(architecture: str, kernel: str, row: Row, config: Config) -> list[dict[str, Any]]:
    """A tile at each of its shapes, as ``probe`` takes it; on Hopper with its machine code."""
    tensors = {"dtype": row.dtype, "weight_dtype": row.weight_dtype, "path": row.path}
    sass = TARGETS[architecture].capability[0] == 9
    return compile_cases(kernel, row, config, sass=sass, **tensors)  # type: ignore[arg-type]


def others(architecture: str, kernel: str, row: Row) -> list[dict[str, Any]]:
    """What else a row of Hopper's serves, by its first tile: other dtypes, and sizes that its blocks do not divide."""
    if TARGETS[architecture].capability[0] != 9 or row.kind == "ieee":
        return []
    config, *_ = tiles(architecture, kernel, row)
    pairs = {"half/2": ("float16", "float16"), "half/4": ("bfloat16", "float32"), "tf32/4": ("float32", "bfloat16")}
    dtype, weight_dtype = pairs[row.name.partition(" ")[0]]
    found = cases(architecture, kernel, replace(row, dtype=dtype, weight_dtype=weight_dtype), config)
    if row.path == "vectors":
        odd = {"m": 6301, "n": 2320, "k": 784, "groups": 1}
        found += [case | odd for case in cases(architecture, kernel, row, config)[:1]]
    return found


def wrong(report: dict[str, Any], device: Device) -> list[str]:
    """Why a compiled kernel may not be launched; reads hazards where the report has machine code."""
    found = []
    if report["stack"]:
        found.append(f"spills {report['stack']} bytes")
    if report["shared"] > device.shared_memory:
        found.append(f"takes {report['shared']} of {device.shared_memory} bytes of shared memory")
    found += [f"a box's stages lie {size} bytes apart" for size in sorted(set(report["boxes"])) if size % BOX_BYTES]
    if "sass" in report:
        lines = parsed(report["sass"])[report["name"]]
        found += [f"hazard: {hazard}" for hazard in hazards(lines)]
        if not device.weight_left and any(products(lines)):
            found.append("a product takes an operand from registers, for a compiler that is not trusted with it")
    return found


def every(architecture: str, kernel: str, row: Row) -> list[dict[str, Any]]:
    """All cases of a row."""
    whole = [case for tile in tiles(architecture, kernel, row) for case in cases(architecture, kernel, row, tile)]
    return whole + others(architecture, kernel, row)


def judged(architecture: str, kernel: str, python: str, found: list[Row]) -> list[list[str]]:
    """For each kernel compiled of these rows of a part of the table, by two processes, what is wrong with it."""
    device = TARGETS[architecture]
    wanted = [case for row in found for case in every(architecture, kernel, row)]
    requests = [{"device": dataclasses.asdict(device), "cases": part} for part in (wanted[::2], wanted[1::2])]
    with ThreadPoolExecutor(2) as pool:
        return [wrong(report, device) for half in pool.map(lambda r: probe(r, python), requests) for report in half]


def launched(keeps_operands: bool) -> str:
    """The part of the table that is launched from on Hopper."""
    return "sm_90" if keeps_operands else "sm_90 shared"


def trusted(python: str) -> bool:
    """Whether the package puts W' into registers with an interpreter's Triton."""
    question = "from rlrr_kernels.backends.triton.compiler import keeps_operands; print(keeps_operands())"
    answer = subprocess.run([python, "-c", question], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return answer.strip() == "True"


def interpreter(version: str, folder: Path) -> str:
    """This Python with another Triton in front of its own, installed into ``folder`` if it is not there."""
    target = folder / version
    if version == "newest" or not (target / "triton").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(target)]
        subprocess.run([*command, "triton" if version == "newest" else f"triton=={version}"], check=True)
    script = target / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{target}:$PYTHONPATH" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


def main() -> int:
    """Print a table; 1 if something that can be launched is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.gates", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("version", nargs="*", help="of Triton, or newest; default: the installed one")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "triton", help="default: build/triton")
    arguments = parser.parse_args()
    bad = 0
    heads = ("Triton", "W'", "kernel", "compiled", "wrong", "hazards", "launched")
    print(f"| {' | '.join(heads)} |\n| --- | --- | --- | ---: | ---: | ---: | --- |")
    for version in arguments.version or ["installed"]:
        python = sys.executable if version == "installed" else interpreter(version, arguments.folder)
        name = f"{triton_version(python)}{f' ({version})' if version.isalpha() else ''}"
        now = launched(trusted(python))
        for part, kernel in itertools.product(dict.fromkeys((now, "sm_90")), get_args(Kernel)):
            # what is not launched is read for its hazards alone, and not where rare tensors are loaded by the element
            everything = rows(TARGETS[part])
            most = [row for row in everything if row.kind != "ieee" and row.path != "elements"]
            found = judged(part, kernel, python, everything if part == now else most)
            failed = [lines for lines in found if lines]
            hazardous = sum(any(line.startswith("hazard") for line in lines) for lines in failed)
            bad += part == now and bool(failed)
            side, used = "shared memory" if part.endswith("shared") else "registers", "yes" if part == now else "no"
            cells = (name, side, kernel, len(found), len(failed), hazardous, used)
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            for line in sorted({line for lines in failed for line in lines}) if part == now else ():
                print(f"    {line}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
