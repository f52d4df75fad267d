"""What a training step of ViT-B keeps and launches: ``python -m benchmarks.activations`` (some minutes).

Counted, not timed, and without a GPU: bytes of activations that a block keeps for backward, for each token, and the
kernels that forward and backward of all twelve blocks launch. Compiled models are one graph of which PyTorch decides
what is kept; with a budget below 1 it forms cheap results again (``activation_memory_budget``).
"""

from __future__ import annotations

from unittest import mock

import torch
import torch._functorch.config as compiler

from benchmarks import results, steps
from benchmarks.measures import kept_storages
from benchmarks.tables import markdown
from rlrr_kernels.finetune.trainer import ACTIVATION_BUDGET
from rlrr_kernels.ops import recompute

BATCH = 4


def kept_per_token(method: str, dtype: torch.dtype, name: str = "vit_base_patch16_224", size: int = 224) -> float:
    """Return the bytes that one more block of a ViT keeps for backward, for each token."""
    totals = []
    for depth in (1, 3):
        model = steps.build(method, name, "cpu", depth=depth, img_size=size)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            y = model(torch.randn(BATCH, 3, size, size))
        totals.append(sum(size for at, size in kept_storages(y).items() if at not in own))
        tokens = BATCH * model.get_parameter("pos_embed").shape[1]
    return (totals[1] - totals[0]) / 2 / tokens


def launches(implementation: str, dtype: torch.dtype) -> int:
    """Return the kernels that forward and backward of ViT-B's 12 blocks launch at least; see ``Step.launches``."""
    model = steps.build(implementation, "vit_base_patch16_224", "cpu", embed_dim=48, num_heads=3, img_size=32)
    return steps.Step(model, torch.randn(2, 3, 32, 32), torch.arange(2), dtype).launches()


def main() -> None:
    dtypes = torch.float32, torch.bfloat16
    rows = []
    for method in (results.OURS, results.OFFICIAL, results.LORA, results.SSF, results.PROBE):
        kept = [f"{kept_per_token(method, dtype):,.0f}" for dtype in dtypes]
        rows.append([method, *kept, *(f"{launches(method, dtype):,}" for dtype in dtypes)])
        if method == results.OURS:
            with mock.patch.object(recompute, "_enabled", False):
                kept = [f"{kept_per_token(method, dtype):,.0f}" for dtype in dtypes]
            rows.append([f"{method}, RLRR_RECOMPUTE=0", *kept, "", ""])
    for method in (results.OURS_COMPILED, results.OFFICIAL_COMPILED):
        for budget in (1.0, ACTIVATION_BUDGET):
            with compiler.patch(activation_memory_budget=budget):
                kept = []
                for dtype in dtypes:
                    torch._dynamo.reset()
                    kept.append(f"{kept_per_token(method, dtype):,.0f}")
            rows.append([f"{method}, budget {budget}", *kept, "", ""])
    titles = ["", "kept, float32", "kept, bfloat16 autocast", "launches, float32", "launches, bfloat16 autocast"]
    print(markdown(titles, rows))


if __name__ == "__main__":
    main()
