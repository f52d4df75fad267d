"""Fine-tune the embedded ViT on handwritten digits by RLRR and by a linear probe; compare; merge.

Nothing is downloaded: the model ships with the package, the digits with
scikit-learn. Each method runs with the same seeds and epochs, at its own best
learning rate; the epoch is chosen on 200 validation images and the 797 test images
are used once a run.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlrr_kernels import FusedRLRRLinear, merge_and_unload
from rlrr_kernels.finetune import Settings, prepare, train
from rlrr_kernels.finetune.run_folder import draw_comparison, new_folder
from rlrr_kernels.io.files import write_atomically

#: For each method the peak learning rate that did best on seed 0's validation images,
#: of 5e-3, 1e-2, 2e-2 and 4e-2 for RLRR, and of these, 5e-2, 1e-1 and 2e-1 for the probe.
LEARNING_RATES = {"rlrr": 2e-2, "linear": 1e-1}


def merge_check(model: torch.nn.Module, images: torch.Tensor) -> tuple[float, float, bool]:
    """(largest logit, largest change of one when merged, whether all predictions stay)."""
    model.eval()
    merged = merge_and_unload(copy.deepcopy(model))
    assert not any(isinstance(module, FusedRLRRLinear) for module in merged.modules())
    with torch.inference_mode():
        before, after = model(images), merged(images)
    same = torch.equal(before.argmax(1), after.argmax(1))
    return before.abs().max().item(), (before - after).abs().max().item(), same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder; a number is added where it exists")
    args = parser.parse_args()

    console = Console(width=100)
    folder = new_folder(args.out)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in LEARNING_RATES}
    merge: tuple[float, float, bool] | None = None
    for method, lr in LEARNING_RATES.items():
        for seed in range(args.seeds):
            settings = Settings(
                method=method,
                seed=seed,
                lr=lr,
                epochs=args.epochs,
                warmup_epochs=min(Settings.warmup_epochs, args.epochs - 1),
                out=folder / f"{method}-seed{seed}",
            )
            prepared = prepare(settings)
            metrics = train(prepared)
            if metrics["interrupted"]:
                raise SystemExit(130)
            runs[method].append(metrics)
            if method == "rlrr" and seed == 0:
                test = prepared.splits.test
                images = torch.stack([test[i][0] for i in range(len(test))]).to(prepared.device)
                merge = merge_check(prepared.model, images)

    table = Table(title="800 handwritten digits, a 1.0M-parameter ViT pretrained on Fashion-MNIST")
    for column, justify in (("method", "left"), ("trained parameters", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column(f"test accuracy, mean of {args.seeds} seeds (each)", justify="right")
    table.add_column("seconds a run", justify="right")
    for method, results in runs.items():
        accuracies = [run["test_accuracy"] for run in results]
        table.add_row(
            method,
            f"{results[0]['trainable_parameters']:,}",
            f"{100 * mean(accuracies):.2f}% ({', '.join(f'{100 * a:.2f}' for a in accuracies)})",
            f"{mean(run['train_seconds'] for run in results):.1f}",
        )
    console.print(table)

    assert merge is not None
    largest, change, same = merge
    console.print(
        f"Merged into a plain timm model: logits up to {largest:.1f} change by at most {change:.1e}, "
        f"{'every prediction is the same' if same else 'and predictions differ'}."
    )
    plot = folder / "comparison.png"
    write_atomically(plot, draw_comparison([run for results in runs.values() for run in results]))
    summary = {"runs": runs, "merge": {"largest_logit": largest, "largest_change": change, "same_predictions": same}}
    write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    console.print(f"Plot: {plot}\nEvery figure, with versions and settings: {folder / 'summary.json'}", soft_wrap=True)


if __name__ == "__main__":
    main()
