"""Forward, and forward with backward, of ViT-B/16's four linears.

``make bench`` runs these on the GPU if there is one, else a CPU-sized slice. Read
them as ratios within a run: absolute times on a shared CPU mean little.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.implementations import IMPLEMENTATIONS, LAYERS, TOKENS, make_inputs, step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES = (1, 8, 32, 64, 256) if DEVICE == "cuda" else (1, 32)
DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(benchmark: Any, layer: str, images: int, dtype: torch.dtype, backward: bool, name: str) -> None:
    n, k, groups = LAYERS[layer]
    inputs = make_inputs(TOKENS * images, n, k, groups, dtype, DEVICE)
    implementation = IMPLEMENTATIONS[name]

    def run() -> None:
        step(inputs, implementation) if backward else implementation(inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{layer} M={TOKENS * images} {dtype} {'forward+backward' if backward else 'forward'}"
    benchmark.extra_info |= {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    benchmark.pedantic(run, rounds=5 if DEVICE == "cpu" else 30, warmup_rounds=2)
