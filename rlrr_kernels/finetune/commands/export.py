"""``rlrr-finetune export``: the merged model as a program for other runtimes."""

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

from rlrr_kernels.finetune.commands.common import Command, CommandError, checking_input, new_file, say
from rlrr_kernels.finetune.commands.options import add_settings, given
from rlrr_kernels.finetune.commands.runs import add_run_argument, compare, merged, open_run

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
#: Batch sizes the exported program is run with; it is traced with another.
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
        out = new_file(arguments.out, (SUFFIXES[arguments.format],), arguments.overwrite)
        new_file(out.with_name(f"{out.name}.data"), (".data",), arguments.overwrite)
        opened = open_run(arguments.run, given(arguments))
        result = merged(opened, safe=True, count=max(BATCHES))
    export = export_onnx if arguments.format == "onnx" else export_torch
    with _scratch(out) as scratch:
        images = result.images[:1].expand(TRACED, -1, -1, -1).contiguous()
        program = export(result.model, images, scratch / out.name, opened.labels())
        worst, largest, same = 0.0, 0.0, 0
        for batch in BATCHES:
            with torch.no_grad():
                outputs = program(result.images[:batch])
            difference, size, same = compare(result.logits[:batch], outputs)
            # a NaN compares as nothing: it must not pass for a small difference
            worst = max(worst, difference) if difference == difference else float("nan")
            largest = max(largest, size)
        if not worst <= arguments.tolerance * largest:
            raise CommandError(
                f"the exported program's logits differ by {worst:.2g}, more than {arguments.tolerance:g} times the "
                f"largest, {largest:.2g}; nothing is written"
            )
        _move(scratch, out)
    shape = ", ".join(map(str, result.images.shape[1:]))
    say(
        f"wrote {out}: [batch, {shape}] -> [batch, {result.logits.shape[1]}]",
        f"logits of the tuned model and of {out.name}, loaded and run with batches of 1 and of {batch}:",
        f"they differ by {worst:.2g} at most, where the largest is {largest:.2g}; the same class on {same} of {batch}",
    )
    return 0


def require_onnx() -> None:
    """Raises ``ValueError`` with the remedy where a package for ONNX is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"format: onnx needs {', '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")


def export_torch(model: nn.Module, images: Tensor, path: Path, labels: Mapping[str, str]) -> Callable[[Tensor], Tensor]:
    """Write ``path`` by ``torch.export`` and return what it computes once it is loaded again.

    Args:
        model: in evaluation mode.
        images: ``[batch, C, H, W]`` to trace with; the batch, 2 or more, is left open.
        labels: JSON texts to keep with the program, here each in an extra file.
    """
    extra = {f"{name}.json": text for name, text in labels.items()}
    torch.export.save(_traced(model, images), path, extra_files=extra)
    return torch.export.load(path).module()


def export_onnx(model: nn.Module, images: Tensor, path: Path, labels: Mapping[str, str]) -> Callable[[Tensor], Tensor]:
    """Write ``path`` as ONNX and return what ONNX Runtime computes from it; arguments as :func:`export_torch`.

    ``labels`` go into the model's metadata. Weights of more than 2 GB lie beside it, in ``path`` + ``.data``.
    """
    import onnxruntime  # type: ignore[import-untyped]

    traced = _traced(model, images)
    program = torch.onnx.export(traced, (), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
    assert program is not None  # dynamo=True returns one
    program.model.metadata_props.update(labels)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])


def _traced(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},))


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder on the same file system. Files have their final names there: ONNX names its weights' file inside."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        yield Path(folder)


def _move(scratch: Path, out: Path) -> None:
    # weights first: the program that names them appears last
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == out.name):
        os.replace(path, out.with_name(path.name))


COMMAND = Command("export the merged model by torch.export or as ONNX, and compare", DESCRIPTION, add_arguments, run)
