"""A backend that has tiles to choose, in plain PyTorch, beside the CPU's own."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from rlrr_kernels.backends import choice, reference


@dataclass(frozen=True)
class Tile:
    """As the Triton backends' choice."""

    block_m: int
    num_warps: int = 4
    splits: int = 1


TILES = (Tile(64), Tile(128, 8), Tile(32, splits=2))


@pytest.fixture
def tiled(monkeypatch: Any) -> SimpleNamespace:
    """The module; ``ran`` has the pass and tile of each launch."""
    module = SimpleNamespace(ran=[], unsupported=lambda x, weight: None)
    module.candidates = lambda problem, hardware: (*TILES, TILES[0])

    def launching(name: str) -> Any:
        def launch(*tensors: Any, choice: Tile | None = None) -> Any:
            module.ran.append((name, choice))
            return getattr(reference, name)(*tensors)

        return launch

    for name in ("forward", "grad_input", "grad_scales"):
        setattr(module, name, launching(name))
    monkeypatch.setitem(choice.BACKENDS, "tiled", ("tests.tune.tiled", ()))
    monkeypatch.setitem(choice._loaded, "tiled", module)
    return module
