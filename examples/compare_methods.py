"""Compare ways of fine-tuning on one data set: RLRR by rank and start, LoRA, SSF, a linear probe.

    python examples/compare_methods.py                                   # digits, the embedded model
    python examples/compare_methods.py -- --data DATA/cifar10_1k.npz --model vit_small_patch14_reg4_dinov2 \
        --checkpoint DATA/vit_small_patch14_reg4_dinov2.safetensors --img-size 56 --epochs 10 --precision bf16

Options after ``--`` are those of ``rlrr-finetune``, the same for every method. Each method gets its own learning rate,
of the ladder 1, 3, 10, ...: the best on the validation images, where three rates are tried and then the next one beyond
the best as long as that is the first or the last. With this rate it trains on all images but the test's, with each
seed, and sees the test images once a run. Interrupted, the same command goes on.

A difference of two methods has a standard error from the seeds and one from the test images, which are the same for
both; the table shows twice the root of the sum of their squares. Speed and memory are those of a training step, the
methods taken in turn on the same batch.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
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
from rlrr_kernels.finetune.__main__ import main as rlrr_finetune
from rlrr_kernels.finetune.backbone import build_model
from rlrr_kernels.finetune.distributed import choose_device
from rlrr_kernels.finetune.evaluation import AUTOCAST, logits_of
from rlrr_kernels.finetune.loop import load_data
from rlrr_kernels.finetune.run_folder import versions
from rlrr_kernels.finetune.saved_run import open_run, read_metrics
from rlrr_kernels.finetune.settings import Settings
from rlrr_kernels.io.files import write_atomically

#: The ladder of learning rates.
LADDER = tuple(float(f"{digit}e{power}") for power in range(-6, 1) for digit in (1, 3))

#: Row of the table -> options of ``rlrr-finetune``, and the first of the three rates that are tried in any case.
METHODS: dict[str, tuple[dict[str, str], float]] = {
    "linear probe": ({"method": "linear"}, 1e-2),
    "SSF": ({"method": "ssf"}, 3e-3),
    "LoRA, parameters of r = 1": ({"method": "lora"}, 1e-3),
    "LoRA, rank 5": ({"method": "lora", "lora-rank": "5"}, 1e-3),
    "LoRA, rank 10": ({"method": "lora", "lora-rank": "10"}, 1e-3),
    "RLRR, start as published": ({"method": "rlrr"}, 3e-3),
    "RLRR, start at the identity": ({"method": "rlrr", "init": "identity"}, 3e-3),
    "RLRR, r = 2, identity": ({"method": "rlrr", "init": "identity", "rank": "2"}, 3e-3),
    "RLRR, r = 4, identity": ({"method": "rlrr", "init": "identity", "rank": "4"}, 3e-3),
    "RLRR, r = 8, identity": ({"method": "rlrr", "init": "identity", "rank": "8"}, 3e-3),
    "full fine-tuning": ({"method": "full"}, 1e-5),
}
#: The row that the others are compared with.
OURS = "RLRR, start as published"


def run(*command: str) -> None:
    """Run one ``rlrr-finetune`` command; end the program where it ends with an error or by Ctrl-C."""
    print("rlrr-finetune", shlex.join(command), flush=True)
    status = rlrr_finetune(list(command))
    if status:
        sys.exit(status)


def chosen_rate(folder: Path, first: float, common: Sequence[str], seeds: Sequence[int]) -> float:
    """Return the learning rate that is best on validation images, with rates on both sides of it tried."""
    low = LADDER.index(first)
    high = low + 2
    while True:
        rates = LADDER[low : high + 1]
        sweep = ["--weight-decays", "5e-5", "--no-final", "--out", str(folder), "--seeds", *map(str, seeds)]
        run("sweep", *common, "--lrs", *map(str, rates), *sweep)
        best = json.loads((folder / "sweep.json").read_text())["best"]
        rate = None if best is None else float(best["lr"])
        if rate in (None, rates[0]) and low > 0:
            low -= 1
        elif rate == rates[-1] and high < len(LADDER) - 1:
            high += 1
        elif rate is None:
            sys.exit(f"{folder}: all rates diverged")
        else:
            return rate


def trained(folder: Path, rate: float, common: Sequence[str], seed: int) -> Path:
    """Train on all images but the test's, or go on, and return the folder of the run."""
    out = folder / f"lr{rate:g}-seed{seed}"
    if not ((out / "metrics.json").is_file() and read_metrics(out).get("finished")):
        options = [*common, "--lr", str(rate), "--weight-decay", "5e-5", "--protocol", "final", "--seed", str(seed)]
        run("train", *(["--resume", str(out)] if out.exists() else [*options, "--out", str(out)]))
    return out


@torch.no_grad()
def answers(folder: Path) -> list[bool]:
    """Return for each test image whether a run's model classifies it correctly."""
    saved = open_run(folder, {})
    device = choose_device(saved.settings.device)
    model, images = saved.model().to(device), load_data(saved.settings).test
    right: list[bool] = []
    for start in range(0, len(images), 100):
        pairs = [images[i] for i in range(start, min(start + 100, len(images)))]
        logits = logits_of(model, torch.stack([image for image, _ in pairs]).to(device), saved.settings.precision)
        right += (logits.argmax(1).cpu() == torch.tensor([label for _, label in pairs])).tolist()
    return right


class Step:
    """One training step of a method: forward, loss, backward, AdamW."""

    def __init__(self, settings: Settings, classes: int) -> None:
        self.device = choose_device(settings.device)
        self.model = build_model(settings, classes).to(self.device).train()
        self.trainable, _ = count_parameters(self.model)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, settings.weight_decay), lr=1e-4)
        image, _ = load_data(settings).test[0]
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(settings.batch_size, *image.shape, generator=generator).to(self.device)
        self.labels = torch.randint(classes, (settings.batch_size,), generator=generator).to(self.device)
        self.dtype = AUTOCAST[settings.precision]

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
        """Return the peak memory of training above the model's own: activations, gradients, and AdamW's moments."""
        peak = peak_extra_bytes(self)
        moments = (t for state in self.optimizer.state.values() for t in state.values())
        return peak + sum(t.untyped_storage().nbytes() for t in moments)


def costs(runs: Mapping[str, Path], rounds: int = 15) -> dict[str, dict[str, float]]:
    """Return trained parameters, images a second (median) and bytes of training, by method."""
    saved = {name: open_run(folder, {}) for name, folder in runs.items()}
    steps = {name: Step(each.settings, each.classes) for name, each in saved.items()}
    peaks = {name: step.bytes() for name, step in steps.items()}  # runs each twice: warm after it
    seconds: dict[str, list[float]] = {name: [] for name in steps}
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


def difference(ours: Mapping[int, list[bool]], other: Mapping[int, list[bool]]) -> tuple[float, float]:
    """Return other's accuracy less ours in points, over the seeds of both, and twice its standard error."""
    seeds = sorted(ours.keys() & other.keys())
    gaps = torch.tensor([[b - a for a, b in zip(ours[s], other[s], strict=True)] for s in seeds]).double() * 100
    of_images = gaps.mean(0).var().item() / gaps.shape[1]
    of_seeds = gaps.mean(1).var().item() / len(seeds) if len(seeds) > 1 else 0.0
    return gaps.mean().item(), 2 * math.sqrt(of_images + of_seeds)


def rows(results: Mapping[str, dict[str, Any]], speed: str) -> list[list[str]]:
    """Return the table's cells. On a CPU speeds are ratios to RLRR's, which stay true on another machine."""
    unit = 1 if speed == "images/s" else results[OURS]["images_per_second"]
    table = []
    for name, result in results.items():
        scores = [100 * statistics.fmean(right) for right in result["right"].values()]
        spread = f" (std {statistics.stdev(scores):.2f})" if len(scores) > 1 else ""
        gap, error = difference(results[OURS]["right"], result["right"])
        table.append(
            [
                name,
                f"{result['trainable_parameters']:,}",
                f"{result['lr']:g}",
                f"{statistics.fmean(scores):.2f}%{spread}",
                "" if name == OURS else f"{gap:+.2f} ± {error:.2f}",
                f"{result['images_per_second'] / unit:.{0 if unit == 1 else 2}f}",
                f"{result['step_bytes'] / 2**20:.0f} MiB",
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the final runs")
    parser.add_argument("--choose-seeds", type=int, nargs="+", default=[0], help="of the runs that choose a rate")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("options", nargs="*", metavar="-- OPTIONS", help="of rlrr-finetune")
    args = parser.parse_args()
    methods = list(dict.fromkeys([OURS, *args.methods]))

    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Path] = {}
    for name in methods:
        options, first = METHODS[name]
        own = [word for key, value in options.items() for word in (f"--{key}", value)]
        common = [*args.options, "--head-init", "zero", "--no-tensorboard", *own]
        folder = args.out / name.replace(",", "").replace(" = ", "").replace(" ", "-").lower()
        rate = chosen_rate(folder / "choice", first, common, args.choose_seeds)
        folders = {seed: trained(folder, rate, common, seed) for seed in args.seeds}
        runs[name] = next(iter(folders.values()))
        results[name] = {"lr": rate, "right": {seed: answers(out) for seed, out in folders.items()}}
    for name, measured in costs(runs).items():
        results[name] |= measured

    settings = open_run(runs[OURS], {}).settings
    speed = "images/s" if choose_device(settings.device).type == "cuda" else "images/s, of RLRR's"
    headings = [
        "method",
        "trained parameters",
        "lr",
        "test accuracy",
        "against RLRR, points",
        speed,
        "memory of training",
    ]
    table = Table(*headings, title=f"{settings.model} on {settings.dataset}, {len(args.seeds)} seeds")
    for row in rows(results, speed):
        table.add_row(*row)
    Console(width=130).print(table)
    record = {"command": sys.argv, "versions": versions(), "methods": results}
    write_atomically(args.out / "results.json", (json.dumps(record) + "\n").encode())
    print(f"wrote {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
