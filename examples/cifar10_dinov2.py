"""A real backbone on real images: DINOv2 ViT-S/14 on 1,000 images of CIFAR-10, by six ways of fine-tuning.

A folder (``--data-root``) holds what the package does not ship:

- ``cifar10_1k.npz``: uint8 ``train_images [1000, 32, 32, 3]``, ``train_labels``, ``test_images [2000, 32, 32, 3]``,
  ``test_labels``;
- ``vit_small_patch14_reg4_dinov2*.safetensors``: weights of timm's model of that name.

Each method gets its own learning rate, chosen on 200 of the 1,000 images (at a lower resolution, to save
time); then it trains on all 1,000 and sees the 2,000 test images once. Interrupted, the same command goes on.
Speed and memory are those of a training step, the methods taken in turn on the same batch.

    python examples/cifar10_dinov2.py --data-root path/to/data                 # one seed, 112 pixels
    python examples/cifar10_dinov2.py --data-root path/to/data \
        --img-size 224 --choose-img-size 224 --epochs 20 --seeds 0 1 2 --precision bf16           # a GPU
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is no part of the package

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measures import peak_extra_bytes
from rlrr_kernels import count_parameters, param_groups
from rlrr_kernels.finetune import Settings
from rlrr_kernels.finetune.__main__ import main as rlrr_finetune
from rlrr_kernels.finetune.backbone import build_model
from rlrr_kernels.finetune.distributed import choose_device
from rlrr_kernels.finetune.run_folder import versions
from rlrr_kernels.io.files import write_atomically

MODEL = "vit_small_patch14_reg4_dinov2"

#: Row of the table -> options of ``rlrr-finetune``, and the learning rates to choose from.
METHODS: dict[str, tuple[dict[str, str], tuple[float, ...]]] = {
    "linear probe": ({"method": "linear"}, (1e-2, 3e-2, 1e-1)),
    "LoRA (PEFT)": ({"method": "lora"}, (1e-3, 4e-3)),
    "SSF": ({"method": "ssf"}, (3e-3, 1e-2)),
    "RLRR, start as published": ({"method": "rlrr"}, (3e-3, 1e-2)),
    "RLRR, start at the identity": ({"method": "rlrr", "init": "identity"}, (3e-3, 1e-2)),
    "full fine-tuning": ({"method": "full"}, (1e-5, 5e-5)),
}


def tuned(name: str, args: argparse.Namespace, weights: Path) -> dict[str, Any]:
    """Choose the learning rate on validation images, train on all images, test once, for each seed."""
    options, lrs = METHODS[name]
    folder = args.out / name.replace(",", "").replace(" ", "-").lower()
    common = ["--data", str(args.data_root / "cifar10_1k.npz"), "--model", MODEL, "--checkpoint", str(weights)]
    common += ["--precision", args.precision, "--device", args.device, "--no-tensorboard", "--warmup-epochs", "1"]
    for key, value in options.items():
        common += [f"--{key}", value]
    sweep = ["sweep", *common, "--img-size", str(args.choose_img_size), "--epochs", str(args.choose_epochs)]
    sweep += ["--lrs", *map(str, lrs), "--weight-decays", "5e-5", "--no-final", "--out", str(folder / "choice")]
    run(sweep)
    lr = json.loads((folder / "choice" / "sweep.json").read_text())["best"]["lr"]
    accuracies = []
    for seed in args.seeds:
        out = folder / f"seed{seed}"
        if not (out / "metrics.json").is_file() or not finished(out):
            train = ["train", *common, "--img-size", str(args.img_size), "--epochs", str(args.epochs), "--lr", str(lr)]
            train += ["--protocol", "final", "--seed", str(seed)]
            run([*train, "--resume", str(out)] if out.exists() else [*train, "--out", str(out)])
        accuracies.append(json.loads((out / "metrics.json").read_text())["test_accuracy"])
    return {"lr": lr, "test_accuracies": accuracies}


def run(command: list[str]) -> None:
    """One ``rlrr-finetune`` command; ends the program where it ends with an error or by Ctrl-C."""
    print("rlrr-finetune", shlex.join(command))
    status = rlrr_finetune(command)
    if status:
        sys.exit(status)


def finished(folder: Path) -> bool:
    """Whether the run in a folder reached its end."""
    return bool(json.loads((folder / "metrics.json").read_text()).get("finished"))


class Step:
    """One training step of a method: forward, loss, backward, AdamW."""

    def __init__(self, name: str, args: argparse.Namespace, weights: Path, batch: int = 32) -> None:
        settings = Settings(model=MODEL, checkpoint=weights, img_size=args.img_size, **METHODS[name][0])
        self.device = choose_device(args.device)
        self.model = build_model(settings, classes=10).to(self.device).train()
        self.trainable, _ = count_parameters(self.model)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, 5e-5), lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, 3, args.img_size, args.img_size, generator=generator).to(self.device)
        self.labels = torch.randint(10, (batch,), generator=generator).to(self.device)
        self.dtype = {"fp32": None, "bf16": torch.bfloat16}[args.precision]

    def __call__(self) -> tuple[Tensor, ...]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            logits = self.model(self.images)
        F.cross_entropy(logits.float(), self.labels).backward()
        self.optimizer.step()
        # no gradient outlives the step, so that a step's own peak has them all
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return ()

    def bytes(self) -> int:
        """Peak memory of training above the model's own: activations, gradients, and AdamW's moments."""
        peak = peak_extra_bytes(self)
        moments = (t for state in self.optimizer.state.values() for t in state.values())
        return peak + sum(t.untyped_storage().nbytes() for t in moments)


def costs(names: list[str], args: argparse.Namespace, weights: Path, rounds: int = 7) -> dict[str, dict[str, float]]:
    """Trained parameters, images a second (median) and peak bytes of training above the model, by method."""
    steps = {name: Step(name, args, weights) for name in names}
    peaks = {name: step.bytes() for name, step in steps.items()}  # runs each twice: warm after it
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "trainable_parameters": step.trainable,
            "images_per_second": len(step.images) / statistics.median(seconds[name]),
            "step_bytes": peaks[name],
        }
        for name, step in steps.items()
    }


def rows(results: dict[str, dict[str, Any]], speed: str) -> list[list[str]]:
    """The table's cells. On a CPU speeds are ratios to RLRR's, which stay true on another machine."""
    unit = 1 if speed == "images/s" else results[OURS]["images_per_second"]
    table = []
    for name, result in results.items():
        scores = [100 * score for score in result["test_accuracies"]]
        spread = f" (std {statistics.stdev(scores):.2f})" if len(scores) > 1 else ""
        table.append(
            [
                name,
                f"{result['trainable_parameters']:,}",
                f"{result['lr']:g}",
                f"{statistics.mean(scores):.2f}%{spread}",
                f"{result['images_per_second'] / unit:.{0 if unit == 1 else 2}f}",
                f"{result['step_bytes'] / 2**20:.0f} MiB",
            ]
        )
    return table


OURS = "RLRR, start as published"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--img-size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--choose-img-size", type=int, default=56, help="pixels at which learning rates are chosen")
    parser.add_argument("--choose-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_dinov2"))
    args = parser.parse_args()
    if OURS not in args.methods:
        parser.error(f"--methods: {OURS!r} must be one of them, as the others are compared with it")
    weights = sorted(args.data_root.glob(f"{MODEL}*.safetensors"))
    missing = [
        what
        for what, there in (
            ("cifar10_1k.npz", (args.data_root / "cifar10_1k.npz").is_file()),
            (f"{MODEL}*.safetensors", bool(weights)),
        )
        if not there
    ]
    if missing:
        print(f"skipped: {args.data_root} has no {' and no '.join(missing)}; --help says what they hold")
        return

    found = {name: tuned(name, args, weights[0]) for name in args.methods}
    measured = costs(args.methods, args, weights[0])
    results = {name: {**found[name], **measured[name]} for name in args.methods}
    speed = "images/s" if choose_device(args.device).type == "cuda" else "images/s, of RLRR's"
    headings = ["method", "trained parameters", "lr", "test accuracy", speed, "memory of training"]
    table = Table(*headings, title=f"DINOv2 ViT-S/14 at {args.img_size} pixels on 1,000 images of CIFAR-10")
    for row in rows(results, speed):
        table.add_row(*row)
    Console(width=120).print(table)
    record = {"command": sys.argv, "versions": versions(), "methods": results}
    write_atomically(args.out / "results.json", (json.dumps(record, indent=2) + "\n").encode())
    print(f"wrote {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
