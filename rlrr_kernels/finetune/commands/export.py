"""``rlrr-finetune export``: export the merged model as a program for other runtimes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from rlrr_kernels.finetune.commands.common import (
    Command,
    CommandError,
    add_run_argument,
    add_settings,
    checking_input,
    given_settings,
    new_file,
    print_lines,
)
from rlrr_kernels.finetune.commands.merge import compare, merged
from rlrr_kernels.finetune.saved_run import open_run

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
#: Batch sizes of the comparison; the program is traced with another.
BATCHES = (1, 3)
TRACED = 2
TOLERANCE = 1e-4
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

DESCRIPTION = """\
Merge a tuned model and export it, with a batch of any size: as a torch.export program
(.pt2, which torch.export.load reads) or as ONNX (.onnx, which ONNX Runtime reads).
Input: float32 images [batch, channels, height, width], normalised as in training;
output: logits [batch, classes]. The names of the classes, a JSON list, are label_names
in ONNX's metadata, and label_names.json among the extra files of a .pt2.

What was written is loaded and run, and compared with the model before the merge. If
their logits differ by more than --tolerance times the largest logit, that is an error,
and no file is left.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--format", choices=SUFFIXES, required=True, help="onnx, or torch for torch.export")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, .onnx or .pt2")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help=f"largest relative difference (default: {TOLERANCE})",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_settings(parser, only=("model", "checkpoint"))


def run(arguments: argparse.Namespace) -> int:
    with checking_input():
        if not 0 <= arguments.tolerance < float("inf"):
            raise ValueError(f"tolerance: expected a finite number, 0 or more, got {arguments.tolerance}")
        if arguments.format == "onnx":
            require_onnx()
        out = new_file(arguments.out, SUFFIXES[arguments.format], arguments.overwrite)
        new_file(out.with_name(f"{out.name}.data"), ".data", arguments.overwrite)
        saved = open_run(arguments.run, given_settings(arguments))
        result = merged(saved, safe=True, count=max(BATCHES))
    export = export_onnx if arguments.format == "onnx" else export_torch
    with _scratch(out) as scratch:
        images = result.images[:1].expand(TRACED, -1, -1, -1).contiguous()
        program = export(result.model, images, scratch / out.name, saved.label_names())
        worst, largest, same = 0.0, 0.0, 0
        for batch in BATCHES:
            with torch.no_grad():
                outputs = program(result.images[:batch])
            difference, size, same = compare(result.logits[:batch], outputs)
            # max() would drop a NaN
            worst = max(worst, difference) if difference == difference else float("nan")
            largest = max(largest, size)
        if not worst <= arguments.tolerance * largest:
            raise CommandError(
                f"the exported program's logits differ by {worst:.2g}, more than {arguments.tolerance:g} times the "
                f"largest, {largest:.2g}; nothing is written"
            )
        _move(scratch, out)
    shape = ", ".join(map(str, result.images.shape[1:]))
    print_lines(
        f"wrote {out}: [batch, {shape}] -> [batch, {result.logits.shape[1]}]",
        f"logits of the tuned model and of {out.name}, loaded and run with batches of 1 and of {batch}:",
        f"they differ by {worst:.2g} at most, where the largest is {largest:.2g}; the same class on {same} of {batch}",
    )
    return 0


def require_onnx() -> None:
    """Raise ``ValueError`` if a package for ONNX is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"format: onnx needs {', '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")


def export_torch(model: nn.Module, images: Tensor, path: Path, labels: Mapping[str, str]) -> Callable[[Tensor], Tensor]:
    """Write ``path`` by ``torch.export``, load it again and return the loaded program.

    Args:
        model: In evaluation mode.
        images: ``[batch, C, H, W]`` to trace with, of 2 images or more. The batch size stays dynamic.
        path: File to write.
        labels: JSON texts to store as extra files.
    """
    extra = {f"{name}.json": text for name, text in labels.items()}
    torch.export.save(_traced(model, images), path, extra_files=extra)
    return torch.export.load(path).module()


def export_onnx(model: nn.Module, images: Tensor, path: Path, labels: Mapping[str, str]) -> Callable[[Tensor], Tensor]:
    """Write ``path`` as ONNX, load it in ONNX Runtime and return a function that runs it.

    The arguments are those of :func:`export_torch`; ``labels`` become metadata of the model. Weights of more than
    2 GB are in ``path`` + ``.data``.
    """
    import onnxruntime  # type: ignore[import-untyped]

    traced = _traced(model, images)
    program = torch.onnx.export(traced, (), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
    assert program is not None  # never with dynamo=True
    program.model.metadata_props.update(labels)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])


def _traced(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` for files with their final names, as ONNX contains its weights' file name."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        yield Path(folder)


def _move(scratch: Path, out: Path) -> None:
    # the program comes last, after the weights that it refers to
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == out.name):
        os.replace(path, out.with_name(path.name))


COMMAND = Command("export the merged model by torch.export or as ONNX, and compare", DESCRIPTION, add_arguments, run)
