"""What the whole suite measures, and the command that runs it on a GPU: ``python -m benchmarks.chunks [PREFIX]``.

A chunk is what one process measures and writes into one file of results. It takes under ten minutes on an H200 (an
estimate), and is ended after ``--seconds``. Each of this package's backends is checked first, unless it was checked
before (`python -m rlrr_kernels check`); a backend that is wrong is not measured. A prefix, as ``layer-vit_b``, ``norm``
or ``step``, selects the chunks whose names start with it; ``--list`` prints them. Options after ``--`` go to pytest:
``-- -k "not autotune"`` leaves out the rival that searches tiles for a minute a shape.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.results import RANKS
from rlrr_kernels.check import command as check
from rlrr_kernels.check import processes

FOLDER = Path(__file__).parent
SUITES = {"layer": "test_layer.py", "norm": "test_norm.py", "launch": "test_launch.py", "step": "test_vit_step.py"}
#: A chunk that takes longer hangs, or is not made for this GPU.
SECONDS = 900.0
#: Batch sizes of the whole suite, and of the slice for a device. On a GPU the slice takes about 7 minutes with its
#: training steps, by the estimates of :func:`layer_chunk`; on a CPU the clock decides how far it comes.
IMAGES = (1, 8, 32, 64, 256)
SLICE_IMAGES = {"cuda": (1, 32), "cpu": (1, 8, 32)}
DTYPES = ("bfloat16", "float32")
#: Ranks above 1 are measured in two linears of a model: one in three groups, and the smallest.
RANKED_MODEL, RANKED_LAYERS = "vit_b", ("qkv", "proj")
RANKED_IMAGES = {"cuda": (1, 32), "cpu": (8,)}
#: ``max-autotune`` searches tiles for a minute a shape: it is measured in bfloat16 for the ViTs at these batch sizes.
SEARCHED_IMAGES = (1, 32, 256)
#: Training steps: key -> timm's name. Each batch size is a chunk, as compiling takes minutes.
STEP_MODELS = {"vit_b": "vit_base_patch16_224", "vit_l": "vit_large_patch16_224"}
STEP_BATCHES = (64, 256)
#: Chunk -> key, batch size and rank of its steps.
STEPS = {
    **{f"step-{key}-{batch}": (key, batch, 1) for key in STEP_MODELS for batch in STEP_BATCHES},
    **{f"step-{RANKED_MODEL}-r{rank}": (RANKED_MODEL, STEP_BATCHES[0], rank) for rank in RANKS[1:]},
}


@dataclass(frozen=True)
class Shape:
    """One linear layer: ``n`` output and ``k`` input features, ``tokens`` in an image, row groups with a v each."""

    key: str
    model: str
    layer: str
    tokens: int
    n: int
    k: int
    groups: int


def _block(key: str, model: str, tokens: int, dim: int, hidden: int, groups: int, stage: str = "") -> list[Shape]:
    sizes = {"qkv": (3 * dim, dim, groups), "proj": (dim, dim, 1), "fc1": (hidden, dim, 1), "fc2": (dim, hidden, 1)}
    return [Shape(key, model, stage + layer, tokens, *size) for layer, size in sizes.items()]


#: Key on the command line -> the linears of a block (of each stage for Swin, whose published qkv trains one v).
MODELS: dict[str, list[Shape]] = {
    "vit_b": _block("vit_b", "ViT-B/16", 197, 768, 3072, 3),
    "vit_l": _block("vit_l", "ViT-L/16", 197, 1024, 4096, 3),
    "vit_h": _block("vit_h", "ViT-H/14", 257, 1280, 5120, 3),
    "swin_b": [
        shape
        for stage, tokens in enumerate((3136, 784, 196, 49))
        for shape in _block("swin_b", "Swin-B", tokens, 128 << stage, 512 << stage, 1, f"{stage + 1}.")
    ],
}


def searched(shape: Shape, images: int, dtype: str) -> bool:
    """Return whether ``max-autotune`` is measured at this shape."""
    return images in SEARCHED_IMAGES and dtype == "bfloat16" and shape.key != "swin_b"


def layer_chunk(shape: Shape, dtype: str, rank: int = 1) -> str:
    """Return the chunk of the whole suite that measures a layer in a dtype at a rank.

    On an H200 about 4 minutes for a ViT's layer in bfloat16, 8 for a ViT in float32 and for a stage of Swin in one
    dtype; 3 for a rank above 1. The estimate: compiling takes 8 s for each number of tokens and 40 s more where tiles
    are searched, then each direction takes :data:`~benchmarks.timing.BUDGET`.
    """
    if rank > 1:
        return f"layer-{shape.key}-r{rank}"
    if shape.key == "swin_b":
        return f"layer-swin_b-{dtype}-stage{shape.layer[0]}"
    return f"layer-{shape.key}-{dtype}" + (f"-{shape.layer}" if dtype == "bfloat16" else "")


def chunks() -> Iterator[str]:
    """Yield the name of every chunk of the whole suite, in order."""
    found = (layer_chunk(shape, dtype) for shapes in MODELS.values() for dtype in DTYPES for shape in shapes)
    yield from dict.fromkeys(found)
    yield from (layer_chunk(MODELS[RANKED_MODEL][0], DTYPES[0], rank) for rank in RANKS[1:])
    yield "norm"
    yield "launch"
    yield from STEPS


def command(chunk: str, options: Sequence[str] = ()) -> list[str]:
    """Return the command that measures a chunk and writes its results; ``options`` go to pytest."""
    suite = FOLDER / SUITES[chunk.partition("-")[0]]
    return [
        *(sys.executable, "-m", "pytest", str(suite), "-q", *options),
        *("--chunk", chunk, "--results", "--results-command", f"make bench-gpu CHUNK={chunk}"),
    ]


def run(names: Sequence[str], start: Callable[[list[str]], int], options: Sequence[str] = ()) -> list[str]:
    """Run each chunk, also after one has failed, and return those that failed.

    Args:
        names: The chunks.
        start: Runs a command and returns its exit status.
        options: Options of pytest.
    """
    failed = []
    for number, chunk in enumerate(names, 1):
        print(f"chunk {number} of {len(names)}: {chunk}", flush=True)
        status = start(command(chunk, options))
        if status == processes.TIME_OUT:
            print(f"{chunk}: its time was up", file=sys.stderr)
        if status != 0:
            failed.append(chunk)
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chunks; return 0, 1 if a case failed, 2 for a bad argument or without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chunks",
        description="The whole suite on a GPU, a process and a results file for each chunk. Options after -- go to "
        "pytest.",
        allow_abbrev=False,
    )
    parser.add_argument("prefix", nargs="?", default="", help="of the names of the chunks to run; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for a chunk; default: %(default)g")
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = [*given, "--"].index("--")
    args = parser.parse_args(given[:at])
    names = [name for name in chunks() if name.startswith(args.prefix)]
    if not names:
        parser.error(f"prefix: expected the start of a chunk's name (see --list), got {args.prefix!r}")
    if args.list:
        print("\n".join(names))
        return 0
    if not torch.cuda.is_available():
        print(
            "bench-gpu: no CUDA device is visible to torch; `pytest benchmarks/` measures a slice on a CPU",
            file=sys.stderr,
        )
        return 2
    processes.exit_on_signals()
    try:
        wrong, untried = check.failures(torch.device("cuda", torch.cuda.current_device()))
    except OSError as error:  # the processes of the chunks would not know which backend is wrong
        print(f"bench-gpu: what the check found cannot be kept: {error}", file=sys.stderr)
        return 2
    for name, reason in wrong.items():
        print(f"backend {name} is not measured, its check failed: {reason}", file=sys.stderr)
    for name, reason in untried.items():
        print(f"backend {name} is measured unchecked, its check could not be made: {reason}", file=sys.stderr)
    failed = run(names, lambda command: processes.run_command(command, args.seconds), given[at + 1 :])
    if failed:
        print(f"chunks with a failed case, or not at their end: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or wrong or untried else 0


if __name__ == "__main__":
    sys.exit(main())
