"""``rlrr-analyze``: compares models tuned in several ways with their base model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from rlrr_kernels.analysis import sources
from rlrr_kernels.analysis.base import base_weights
from rlrr_kernels.analysis.comparison import analyze
from rlrr_kernels.analysis.figure import draw
from rlrr_kernels.io.checks import read_json
from rlrr_kernels.io.files import check_writable, write_atomically

DESCRIPTION = """\
Compare tuned models with the model they were tuned from, layer by layer: singular
values, how far the leading directions of output and input turn, size and rank of the
update, and how much of it is a rescaling of the one side, the other, or both.

Each tuned model is given by how it was tuned; an option may be repeated. Writes
analysis.json and analysis.png, and prints the medians over layers.

    rlrr-analyze runs/mine --rlrr runs/mine
    rlrr-analyze runs/mine --rlrr runs/mine --ssf runs/ssf --lora runs/lora --full runs/full
    rlrr-analyze vit_base_patch16_224.augreg_in21k --rlrr runs/mine --lora lora_folder --full tuned.pth
"""

#: Column of the printed table -> figure of the summary and how it is written.
COLUMNS = {
    "|W'-W|/|W|": ("relative_update", "{:.2%}"),
    "output turns": ("rotation_out", "{:.2f}°"),
    "input turns": ("rotation_in", "{:.2f}°"),
    "rank": ("update_rank", "{:.0f}"),
    "effective": ("update_effective_rank", "{:.1f}"),
    "output scaling": ("share_out", "{:.0%}"),
    "input scaling": ("share_in", "{:.0%}"),
    "both": ("share_rescaling", "{:.0%}"),
    "low rank": ("share_low_rank", "{:.0%}"),
}


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    result = argparse.ArgumentParser(
        prog="rlrr-analyze", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("base", help="timm model name, or a run folder (its model), or a file with a state dict")
    result.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the base's weights, where not timm's own (.safetensors, .pth or .npz)",
    )
    for name, metavar, text in (
        ("rlrr", "FOLDER", "run folder, or adapter folder"),
        ("lora", "FOLDER", "run folder, or adapter folder; of PEFT too"),
        ("ssf", "PATH", "run folder, adapter folder, or state dict with <layer>.ssf_scale or of SSF's own code"),
        ("full", "PATH", "run folder, adapter folder, or state dict of a fully fine-tuned model"),
    ):
        result.add_argument(f"--{name}", action="append", default=[], type=Path, metavar=metavar, help=text)
    result.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path("analysis"), help="folder to write to (default: %(default)s)"
    )
    result.add_argument(
        "--layers", default="*", metavar="PATTERN", help="shell pattern over layers' names (default: all)"
    )
    result.add_argument("--top", type=int, default=8, help="leading singular vectors to compare (default: %(default)s)")
    result.add_argument("--device", default="cpu", help="where to compute: cpu in float64, cuda in float32")
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit status is 0, 2 for bad arguments or files, or 130 after Ctrl-C."""
    options = parser()
    arguments = options.parse_args(argv)
    try:
        analysis = run(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        options.exit(2, f"rlrr-analyze: error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    show(analysis)
    print(f"wrote {arguments.out / 'analysis.json'} and {arguments.out / 'analysis.png'}")
    return 0


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read, compare and write; returns the content of ``analysis.json``."""
    readers: dict[str, Callable[..., sources.Tuned]] = {
        "rlrr": sources.rlrr_adapter,
        "ssf": sources.ssf_checkpoint,
        "lora": sources.lora_adapter,
        "full": sources.full_checkpoint,
    }
    given = [(reader, path) for name, reader in readers.items() for path in getattr(arguments, name)]
    if not given:
        raise ValueError("nothing to compare: give at least one of --rlrr, --ssf, --lora, --full")
    if arguments.top < 1:
        raise ValueError(f"--top: expected 1 or more, got {arguments.top}")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {arguments.device!r} cannot be used: {error}") from error
    base = base_weights(arguments.base, arguments.checkpoint)
    tuned = [reader(path, base) for reader, path in given]
    # checked before minutes of work
    arguments.out.mkdir(parents=True, exist_ok=True)
    check_writable(arguments.out)
    progress = partial(tqdm, unit="layer", disable=None, leave=False)
    analysis = analyze(
        base, tuned, layers=arguments.layers, top=arguments.top, device=arguments.device, progress=progress
    )
    analysis = {"base": {"name": arguments.base, "checkpoint": _text(arguments.checkpoint)}, **analysis}
    picture = draw(analysis, f"{_title(arguments.base)}: leading {arguments.top} directions of each layer")
    write_atomically(arguments.out / "analysis.json", (json.dumps(analysis, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(arguments.out / "analysis.png", picture)
    return analysis


def show(analysis: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table of medians over layers, with one row for each tuned model."""
    table = Table(title=f"Medians over layers; directions and low rank: {analysis['top']}")
    table.add_column("")
    table.add_column("layers", justify="right")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for method in analysis["methods"]:
        cells = [
            "-" if method["summary"][key] is None else form.format(method["summary"][key])
            for key, form in COLUMNS.values()
        ]
        table.add_row(method["label"], str(len(method["layers"])), *cells)
    # in a log file rich would cut the headings to 80 columns
    console = console or (Console() if sys.stdout.isatty() else Console(width=140))
    console.print(table)
    for method in analysis["methods"]:
        if method["skipped"]:
            console.print(f"{method['label']}: {len(method['skipped'])} tuned tensors belong to no linear of the base")


def _title(base: str) -> str:
    """The name of the model, also if the base is a run folder."""
    path = Path(base)
    return str(read_json(path / "metrics.json")["settings"]["model"]) if path.is_dir() else path.name


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


if __name__ == "__main__":
    raise SystemExit(main())
