"""Made-up entries and a made-up GPU."""

from __future__ import annotations

from typing import Any

from rlrr_kernels.backends.triton.config import Config, Device
from rlrr_kernels.backends.triton.tuned_file import Entry, Layer, Where

DEVICE = Device(capability=(9, 0), multiprocessors=132, shared_memory=232448)
GPU = "Made-up GPU"
WHERE = Where.on(GPU, (9, 0))
FORWARD = Layer("forward", 768, 3072, 1, "half", "boxes", 2, 2)
GRAD_INPUT = Layer("grad_input", 768, 3072, 3, "half", "boxes", 2, 2)
GRAD_SCALES = Layer("grad_scales", 768, 3072, 1, "half", "boxes", 2, 2)
CONFIG = Config(128, 128, 64, 8, 4)
NARROW = Config(64, 64, 64, 4, 3)


def entry(m: int = 1000, layer: Layer = FORWARD, config: Config | None = CONFIG, **more: Any) -> Entry:
    return Entry(more.pop("where", WHERE), layer, m, config, **more)
