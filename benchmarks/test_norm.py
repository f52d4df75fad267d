"""SSF's affine behind a LayerNorm: fused, as two operations, and the LayerNorm without it, for ViT-B/16's tokens.

Read the times as ratios within a run, and LayerNorm alone as the floor: the fused layer
moves the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlrr_kernels.norm import SSFLayerNorm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES = (1, 32, 256) if DEVICE == "cuda" else (8,)
TOKENS, D = 197, 768


def _layers(dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    norm = nn.LayerNorm(D, device=DEVICE, dtype=dtype).requires_grad_(False)
    fused = SSFLayerNorm.from_layer_norm(norm)

    def two_operations(x: Tensor) -> Tensor:
        return (norm(x) * fused.ssf_scale + fused.ssf_shift).to(dtype)

    return {"fused": fused, "two operations": two_operations, "LayerNorm alone": norm}


@pytest.mark.parametrize("name", ["fused", "two operations", "LayerNorm alone"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("images", IMAGES)
def test_norm(benchmark: Any, images: int, dtype: torch.dtype, backward: bool, name: str) -> None:
    x, dy = (torch.randn(images, TOKENS, D, device=DEVICE, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    layer = _layers(dtype)[name]

    def run() -> None:
        y = layer(x)
        if backward:
            y.backward(dy)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"LayerNorm M={TOKENS * images} {dtype} {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info |= {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    benchmark.pedantic(run, rounds=5 if DEVICE == "cpu" else 30, warmup_rounds=2)
