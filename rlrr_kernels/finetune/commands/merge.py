"""``rlrr-finetune merge``: a tuned model as plain timm weights."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from rlrr_kernels.finetune.backbone import DTYPES
from rlrr_kernels.finetune.commands.common import (
    Command,
    CommandError,
    add_run_argument,
    add_settings,
    check_out,
    checking_input,
    given_settings,
    new_file,
    print_lines,
)
from rlrr_kernels.finetune.saved_run import PEERS, SavedRun, open_run
from rlrr_kernels.io.files import write_atomically
from rlrr_kernels.layers.linear import FusedRLRRLinear
from rlrr_kernels.models.merge import merge_and_unload
from rlrr_kernels.models.modules import adapters

DESCRIPTION = """\
Write a tuned model as plain weights, with no trace of the method left: rescaled
linears become linears, norms and the patch embedding absorb their affines. The file
loads into timm.create_model(MODEL, num_classes=...), and costs what that model costs.
Its metadata has the names of the classes, a JSON list, as label_names.

What was written is read back, and its logits are compared with the tuned model's.
Merging is done in float32; --dtype rounds once, at the end.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write, .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights written (default: fp32)")
    parser.add_argument("--safe", action="store_true", help="refuse to merge values that are not finite")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    add_settings(parser, only=("model", "checkpoint"))


def run(arguments: argparse.Namespace) -> int:
    with checking_input():
        out = new_file(arguments.out, ".safetensors", arguments.overwrite)
        saved = open_run(arguments.run, given_settings(arguments))
        plain = saved.plain_model()
        dtype = DTYPES[arguments.dtype]
        check_out(out.parent, sum(tensor.numel() for tensor in plain.state_dict().values()) * dtype.itemsize)
        result = merged(saved, safe=arguments.safe)
    state = {name: _rounded(name, tensor, dtype) for name, tensor in result.model.state_dict().items()}
    settings = saved.settings
    metadata = {"format": "pt", "model": settings.model, "num_classes": str(saved.classes), "dtype": arguments.dtype}
    write_atomically(out, save(state, metadata | saved.label_names()))

    print_lines(
        f"wrote {out}: {len(state)} tensors, {sum(t.numel() for t in state.values()):,} values in {arguments.dtype}"
    )
    written, names = load_file(out), plain.state_dict().keys()
    _print_lost_updates(result, written)
    if written.keys() == names:
        size = f", img_size={settings.img_size}" if settings.img_size else ""
        print_lines(
            f"it loads into timm.create_model({settings.model!r}, num_classes={saved.classes}{size}), strict=True"
        )
    else:
        added = sorted(written.keys() - names)
        print_lines(
            f"timm's {settings.model} has no {added[0]}, one of {len(added)} biases of layers that had none: it "
            "refuses the file, or with strict=False drops them, unless those layers are given a bias first"
        )
        plain = result.model
    plain.load_state_dict(written)
    with torch.no_grad():
        difference, largest, same = compare(result.logits, plain(result.images))
    count = len(result.images)
    print_lines(
        f"logits before and after on {count} random images: they differ by {difference:.2g} at most, where the largest "
        f"is {largest:.2g}; the same class on {same} of {count}"
    )
    return 0


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if bool((tensor.isfinite() & ~rounded.isfinite()).any()):
        raise CommandError(f"dtype: {name} has values beyond the range of {dtype}; nothing is written")
    # safetensors holds no views and no shared tensors
    return rounded.detach().clone(memory_format=torch.contiguous_format)


def _print_lost_updates(result: Merged, state: Mapping[str, Tensor]) -> None:
    """Print which share of the weights' updates is lost by rounding to a narrow dtype."""
    tuned = dict(result.model.named_parameters())
    lost = changed = 0
    for name, weight in result.frozen.items():
        moved = tuned[f"{name}.weight"] != weight
        written = state[f"{name}.weight"]
        lost += int((moved & (written == weight.to(written.dtype))).sum())
        changed += int(moved.sum())
    if lost > 0.001 * changed:
        print_lines(
            f"rounding undoes the update of {lost / changed:.1%} of the weights that it changes; --dtype fp32 keeps it"
        )


@dataclass(frozen=True)
class Merged:
    """A plain timm model that is equivalent to the tuned one.

    Attributes:
        model: In float32, in evaluation mode, on the CPU.
        images: Random images for a comparison, float32 ``[count, C, H, W]``.
        logits: Outputs of the tuned model before the merge, float32 ``[count, classes]``.
        frozen: Weight of each rescaled linear before the merge, by name.
    """

    model: nn.Module
    images: Tensor
    logits: Tensor
    frozen: Mapping[str, Tensor]


@torch.no_grad()
def merged(saved: SavedRun, *, safe: bool, count: int = 4) -> Merged:
    """Merge a run's model into plain layers, in float32.

    Args:
        saved: The run.
        safe: Whether to refuse values that are not finite.
        count: Number of random images for a comparison.

    Raises:
        ValueError: If the model cannot be built, its method cannot be merged, or ``safe`` and a value is not finite.
    """
    if saved.settings.method in PEERS:
        raise ValueError(f"method: expected a run of rlrr, linear or full to merge, got {saved.settings.method}")
    model = saved.model().float()
    images = torch.randn(count, *input_size(model), generator=torch.Generator().manual_seed(0))
    logits = model(images)
    frozen = {name: m.weight for name, m in model.named_modules() if isinstance(m, FusedRLRRLinear)}
    if any(True for _ in adapters(model)):
        with warnings.catch_warnings():
            # the command itself prints which biases were added
            warnings.filterwarnings("ignore", "merging gave ")
            model = merge_and_unload(model, safe_merge=safe)
    elif safe and not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError("safe: the model has values that are not finite")
    return Merged(model.eval(), images, logits, frozen)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of a timm model's input."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    config: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    channels, height, width = config["input_size"]
    return (channels, *size) if size is not None else (channels, height, width)


def compare(ours: Tensor, theirs: Tensor) -> tuple[float, float, int]:
    """Compare logits ``[count, classes]``: (largest difference, largest of ``ours``, rows of equal prediction)."""
    difference = (ours - theirs).abs().max().item()
    return difference, ours.abs().max().item(), int((ours.argmax(1) == theirs.argmax(1)).sum())


COMMAND = Command("write a tuned model as plain timm weights", DESCRIPTION, add_arguments, run)
