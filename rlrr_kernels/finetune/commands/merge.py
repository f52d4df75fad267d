"""``rlrr-finetune merge``: a tuned model as plain timm weights."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from rlrr_kernels.checkpoint import write_atomically
from rlrr_kernels.finetune.commands.common import Command, CommandError, check_room, checking_input, new_file, say
from rlrr_kernels.finetune.commands.options import add_settings, given
from rlrr_kernels.finetune.commands.runs import Merged, add_run_argument, compare, merged, open_run
from rlrr_kernels.finetune.models import DTYPES

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
        out = new_file(arguments.out, (".safetensors",), arguments.overwrite)
        opened = open_run(arguments.run, given(arguments))
        plain = opened.plain()
        dtype = DTYPES[arguments.dtype]
        check_room(out, sum(tensor.numel() for tensor in plain.state_dict().values()) * dtype.itemsize)
        result = merged(opened, safe=arguments.safe)
    state = {name: _rounded(name, tensor, dtype) for name, tensor in result.model.state_dict().items()}
    settings = opened.settings
    about = {"format": "pt", "model": settings.model, "num_classes": str(opened.classes), "dtype": arguments.dtype}
    write_atomically(out, save(state, about | opened.labels()))

    say(f"wrote {out}: {len(state)} tensors, {sum(t.numel() for t in state.values()):,} values in {arguments.dtype}")
    written, names = load_file(out), plain.state_dict().keys()
    _say_loss(result, written)
    if written.keys() == names:
        size = f", img_size={settings.img_size}" if settings.img_size else ""
        say(f"it loads into timm.create_model({settings.model!r}, num_classes={opened.classes}{size}), strict=True")
    else:
        added = sorted(written.keys() - names)
        say(
            f"timm's {settings.model} has no {added[0]}, one of {len(added)} biases of layers that had none: it "
            "refuses the file, or with strict=False drops them, unless those layers are given a bias first"
        )
        plain = result.model
    plain.load_state_dict(written)
    with torch.no_grad():
        difference, largest, same = compare(result.logits, plain(result.images))
    count = len(result.images)
    say(
        f"logits before and after on {count} random images: they differ by {difference:.2g} at most, where the largest "
        f"is {largest:.2g}; the same class on {same} of {count}"
    )
    return 0


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if bool((tensor.isfinite() & ~rounded.isfinite()).any()):
        raise CommandError(f"dtype: {name} has values beyond the range of {dtype}; nothing is written")
    # a file of tensors holds no views and no tensor twice
    return rounded.detach().clone(memory_format=torch.contiguous_format)


def _say_loss(result: Merged, state: Mapping[str, Tensor]) -> None:
    """Say how much of the update rounding to a narrow dtype undoes."""
    tuned = dict(result.model.named_parameters())
    lost = changed = 0
    for name, weight in result.frozen.items():
        moved = tuned[f"{name}.weight"] != weight
        written = state[f"{name}.weight"]
        lost += int((moved & (written == weight.to(written.dtype))).sum())
        changed += int(moved.sum())
    if lost > 0.001 * changed:
        say(f"rounding undoes the update of {lost / changed:.1%} of the weights that it changes; --dtype fp32 keeps it")


COMMAND = Command("write a tuned model as plain timm weights", DESCRIPTION, add_arguments, run)
