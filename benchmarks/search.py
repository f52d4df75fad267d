"""Find the tiles worth shipping, without a GPU: ``python -m benchmarks.search``.

For every kernel and architecture it compiles many tiles, reads their registers, stack,
shared memory and loops, lets the model of ``cost.py`` predict a list of shapes on each
GPU of the architecture, and keeps the few tiles that together lose least. A tile that
spills or ends the compiler is never kept; each ``--floor PYTHON`` names an interpreter with
an older Triton, which must compile what is kept as well.

The result is ``rlrr_kernels/backends/triton/tiles_table.json``. What was compiled is
remembered in ``--cache`` under the text of the kernels, so a search that was
stopped goes on where it was, and a changed kernel is compiled again. ``--status`` compiles
nothing, names the rows that were found with other kernels, and exits 1 if there are any.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks.disassemble import CompilerEnded, as_case, probe
from benchmarks.instructions import mix
from benchmarks.search_space import GPUS, LAYERS, TARGETS, TOKENS, Row, rows, shapes, variants
from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import cost, tiles_table
from rlrr_kernels.backends.triton.config import Config, Device
from rlrr_kernels.backends.triton.tiles_table import Kernel, Tile

#: Candidates of a row at most; one more must make some shape class faster by this much in the mean.
MOST, GAIN = 6, 0.002
#: Cases compiled between two saves.
BATCH = 16
PACKAGE = Path(tiles_table.__file__).parent


def kernel_text(kernel: Kernel) -> str:
    """Fingerprint of a kernel's source, comments and layout left out."""
    digest = hashlib.sha256()
    for file in (PACKAGE / f"{kernel}.py", PACKAGE / "tiles.py"):
        with tokenize.open(file) as text:
            for token in tokenize.generate_tokens(text.readline):
                if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE) and token.string.strip():
                    digest.update(token.string.encode() + b"\n")
    return digest.hexdigest()[:16]


def triton_version(python: str) -> str:
    """Version of the Triton that an interpreter brings."""
    command = [python, "-c", "import triton; print(triton.__version__)"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def measure(python: str, device: Device, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """The product kernel's report for each case; None for one that ended the compiler."""
    found: list[dict[str, Any] | None] = [None] * len(cases)
    start = 0
    while start < len(cases):
        try:
            reports = probe({"device": dataclasses.asdict(device), "cases": cases[start:]}, python)
            done = len(cases)
        except CompilerEnded as end:
            reports = end.reports
            done = (
                start + 1 + max((r["index"] for r in reports), default=-1) + 1
            )  # that case, and the one that ended it
        for report in reports:
            # besides the product there are kernels that add up; slices of W's rows are one kernel several times
            if not report["name"].startswith("sum_"):
                found[start + report["index"]] = report
        start = done
    return found


def compile_cases(kernel: Kernel, row: Row, config: Config, **rest: Any) -> list[dict[str, Any]]:
    """A config as :func:`probe` takes it, once for each shape; tokens of grad_scales are cut in two."""
    found = []
    for shape in shapes(row.path, kernel):
        half = math.ceil(shape["m"] / 2 / config.block_m) * config.block_m
        tokens = {"split_tokens": half} if kernel == "grad_scales" else {}
        found.append(as_case(kernel, row.kind, config, **rest, **tokens, **shape))
    return found


def as_tile(kernel: Kernel, row: Row, config: Config, architecture: str, reports: Sequence[dict[str, Any]]) -> Tile:
    """Counts of a compiled tile; of several shapes' kernels, the largest of each."""
    block = Tile(**_blocks(config), **dict.fromkeys(_COUNTED, 0))
    step_fma = config.block_m * config.block_n * config.block_k
    stage = cost.stage_bytes(kernel, block, row.x_size, row.weight_size)
    counts: dict[str, int] = dict.fromkeys(_COUNTED, 0)
    for report in reports:
        loop = mix(report["loop"], architecture, row.x_size, step_fma, config.num_warps)
        # tcgen05 reads its operands from shared memory by itself: both tiles, at most
        own = stage if any("UTC" in i and "MMA" in i for i in report["loop"]) else loop.shared_bytes * config.num_warps
        new = {
            "registers": report["registers"],
            "shared": report["shared"],
            "tensor_columns": report["tensor_columns"],
            "slots": loop.slots,
            "shared_bytes": stage + own,
            "waits": loop.waits,
            "outside": report["outside"],
        }
        counts = {name: max(counts[name], value) for name, value in new.items()}
    return Tile(**_blocks(config), **counts)


_COUNTED = ("registers", "shared", "tensor_columns", "slots", "shared_bytes", "waits", "outside")


def _blocks(config: Config) -> dict[str, int]:
    fields = dataclasses.asdict(config)
    del fields["splits"]
    return fields


class Cache:
    """Compiled tiles by architecture, kernel, Triton and kernel text: a file for each, replaced as a whole."""

    def __init__(self, folder: Path, architecture: str, kernel: Kernel, python: str) -> None:
        self.python, self.version = python, triton_version(python)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{architecture.replace(' ', '-')}-{kernel}-{self.version}-{kernel_text(kernel)}.json"
        self.known: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.architecture, self.kernel = architecture, kernel

    def compile(self, wanted: Iterable[tuple[Row, Config, int]]) -> None:
        """Compile what is not known yet of (row, config, splits), saving now and then."""
        missing = [w for w in wanted if self._key(*w) not in self.known]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            cases = [self._cases(*w) for w in batch]
            reports = iter(measure(self.python, TARGETS[self.architecture], [c for some in cases for c in some]))
            for w, some in zip(batch, cases, strict=True):
                tile = self._tile(*w[:2], [next(reports) for _ in some])
                self.known[self._key(*w)] = dataclasses.asdict(tile) if tile else None
            self._save()

    def tile(self, row: Row, config: Config, splits: int = 1) -> Tile | None:
        """A compiled tile; None where it spills, ends the compiler or does not fit."""
        self.compile([(row, config, splits)])
        fields = self.known[self._key(row, config, splits)]
        return Tile(**fields) if fields else None

    def _cases(self, row: Row, config: Config, splits: int) -> list[dict[str, Any]]:
        tensors = {"dtype": row.dtype, "weight_dtype": row.weight_dtype, "path": row.path, "disassemble": True}
        return compile_cases(self.kernel, row, dataclasses.replace(config, splits=splits), **tensors)

    def _tile(self, row: Row, config: Config, reports: Sequence[dict[str, Any] | None]) -> Tile | None:
        most = TARGETS[self.architecture].shared_memory
        good = [r for r in reports if r and r["stack"] == 0 and r["shared"] <= most and r["loop"]]
        return as_tile(self.kernel, row, config, self.architecture, good) if len(good) == len(reports) else None

    def _key(self, row: Row, config: Config, splits: int) -> str:
        return f"{row.name} {list(_blocks(config).values())} {splits}"

    def _save(self) -> None:
        new = self.file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(self.known, indent=0))
        new.replace(self.file)


def times(kernel: Kernel, row: Row, tile: Tile, gpus: Sequence[Device]) -> list[float]:
    """Predicted seconds of one tile for every shape class, with the best splits of its own."""
    found = []
    for device in gpus:
        for (n, k, groups), m in ((layer, m) for layer in LAYERS.values() for m in TOKENS):
            args = (m, n, k, groups, row.kind, row.x_size, row.weight_size, device)
            found.append(configs.choices(kernel, tile, *args)[0].prediction.seconds)
    return found


def choose(seconds: dict[Config, list[float]], most: int = MOST, gain: float = GAIN) -> list[Config]:
    """The few configs that together lose least: greedily, by the mean log of time over the best time of a shape."""
    left = dict(seconds)
    best = [math.inf] * (len(next(iter(left.values()))) if left else 0)
    chosen: list[Config] = []
    while left and len(chosen) < most:

        def loss(config: Config, best: list[float] = best) -> float:
            return sum(math.log(min(a, b)) for a, b in zip(best, left[config], strict=True)) / len(best)

        config = min(left, key=loss)
        if chosen and sum(map(math.log, best)) / len(best) - loss(config) < gain:
            break
        best = [min(a, b) for a, b in zip(best, left.pop(config), strict=True)]
        chosen.append(config)
    return chosen


def search(
    cache: Cache, floors: Sequence[Cache], limit: int | None, recount: Path | None = None
) -> tuple[dict[str, list[Tile]], list[str]]:
    """Row -> tiles to ship, and remarks on where the oldest Triton makes much of a difference.

    ``recount``: a table, all of whose tiles are kept and counted anew, for kernels that changed in no way that could
    change the choice.
    """
    kernel, architecture = cache.kernel, cache.architecture
    target, devices = TARGETS[architecture], [device for part, device in GPUS.values() if part == architecture]
    if recount:
        table = json.loads(recount.read_text())["tiles"][architecture][kernel]
        wanted = {row: [Tile(**tile).config() for tile in table[row.name]] for row in rows(target)}
    else:
        wanted = {row: list(variants(kernel, row, target))[:limit] for row in rows(target)}
    cache.compile((row, config, 1) for row, configs in wanted.items() for config in configs)
    usable = {row: {c: tile for c in some if (tile := cache.tile(row, c))} for row, some in wanted.items()}
    seconds = {row: {c: times(kernel, row, t, devices) for c, t in some.items()} for row, some in usable.items()}
    splits = (1,) if kernel == "grad_scales" else (1, 2)
    checks = [cache, *floors]
    while True:
        chosen = {row: list(some) if recount else choose(some) for row, some in seconds.items()}
        shipped = [(row, config, s) for row, some in chosen.items() for config in some for s in splits]
        for check in checks:
            check.compile(shipped)
        refused = {(row, config) for check in checks for row, config, s in shipped if not check.tile(row, config, s)}
        if not refused:
            break
        for row, config in refused:
            del seconds[row][config]
    if empty := [row.name for row, some in chosen.items() if not some]:
        raise SystemExit(f"no tile of {kernel} for {architecture} compiles without spills for: {', '.join(empty)}")
    remarks = []
    kept = [(row, config) for row, some in chosen.items() for config in some]
    for floor, (row, config) in itertools.product(floors, kept):
        new, old = usable[row][config].slots, floor.tile(row, config)
        if old and old.slots > 1.2 * new:
            blocks = list(_blocks(config).values())
            remarks.append(f"{row.name} {blocks}: {old.slots} slots with Triton {floor.version}, {new} here")
    return {row.name: [usable[row][config] for config in some] for row, some in chosen.items()}, remarks


def _text(value: Any, indent: str = "") -> str:
    """JSON with one candidate a line."""
    if not isinstance(value, (dict, list)) or (isinstance(value, dict) and "block_m" in value) or not value:
        return json.dumps(value)
    inner = indent + " "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _text(v, inner) for v in value) + f"\n{indent}]"
    return "{\n" + ",\n".join(f"{inner}{json.dumps(k)}: {_text(v, inner)}" for k, v in value.items()) + f"\n{indent}}}"


def write(architecture: str, kernel: Kernel, result: dict[str, Any], tiles: dict[str, Any], file: Path) -> None:
    """Merge one search into the table."""
    table = json.loads(file.read_text()) if file.exists() else {}
    table.setdefault("searched", {}).setdefault(architecture, {})[kernel] = result
    table.setdefault("tiles", {}).setdefault(architecture, {})[kernel] = tiles
    new = file.with_suffix(f".{os.getpid()}")
    new.write_text(_text({"searched": table["searched"], "tiles": table["tiles"]}) + "\n")
    new.replace(file)


def stale(file: Path) -> list[str]:
    """Rows found with other kernels than the present ones, or never."""
    searched = json.loads(file.read_text()).get("searched", {})
    return [
        f"{architecture} {kernel}"
        for architecture in TARGETS
        for kernel in get_args(Kernel)
        if searched.get(architecture, {}).get(kernel, {}).get("kernel") != kernel_text(kernel)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS), help="repeatable; default: all")
    parser.add_argument("--kernel", action="append", choices=get_args(Kernel), help="repeatable; default: all")
    parser.add_argument(
        "--floor", action="append", default=[], metavar="PYTHON", help="interpreter with an older Triton; repeatable"
    )
    parser.add_argument("--limit", type=int, help="tiles to try for a row, the promising first; default: all")
    parser.add_argument("--recount", action="store_true", help="keep the table's tiles, count them anew")
    parser.add_argument("--cache", type=Path, default=Path("build/search"), help="default: build/search")
    parser.add_argument("--out", type=Path, default=tiles_table.FILE)
    parser.add_argument("--status", action="store_true", help="only name rows found with other kernels")
    arguments = parser.parse_args()
    if arguments.status:
        old = stale(arguments.out)
        print("\n".join(f"stale: {name}" for name in old) or "the table is that of these kernels")
        sys.exit(1 if old else 0)
    for architecture in arguments.arch or TARGETS:
        for kernel in arguments.kernel or get_args(Kernel):
            cache = Cache(arguments.cache, architecture, kernel, sys.executable)
            floors = [Cache(arguments.cache, architecture, kernel, python) for python in arguments.floor]
            tiles, remarks = search(cache, floors, arguments.limit, arguments.out if arguments.recount else None)
            versions = [c.version for c in (cache, *floors)]
            result = {"kernel": kernel_text(kernel), "triton": versions, "remarks": remarks}
            as_json = {row: [dataclasses.asdict(tile) for tile in some] for row, some in tiles.items()}
            write(architecture, kernel, result, as_json, arguments.out)
            print(f"{architecture} {kernel}: {sum(map(len, tiles.values()))} tiles in {len(tiles)} rows", flush=True)


if __name__ == "__main__":
    main()
