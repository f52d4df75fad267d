"""A file of entries for each test, and a backend that has tiles to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from rlrr_kernels.backends import BACKENDS, choice, reference


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The path of the user's entries; there is no such file yet, and nothing has been read."""
    monkeypatch.setenv("RLRR_TUNED_FILE", str(tmp_path / "tuned.json"))
    monkeypatch.delenv("RLRR_TUNED", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    choice.reload()
    yield tmp_path / "tuned.json"
    choice.reload()


@dataclass(frozen=True)
class Tile:
    """A choice with fields as those of the Triton backends."""

    block_m: int
    num_warps: int = 4
    splits: int = 1


TILES = (Tile(64), Tile(128, 8), Tile(32, splits=2))


@pytest.fixture
def tiled(monkeypatch: Any) -> SimpleNamespace:
    """The backend "tiled", in plain PyTorch; ``ran`` has the pass and tile of each launch."""
    module = SimpleNamespace(ran=[], unsupported=lambda x, weight, rank=1: None)
    module.candidates = lambda problem, hardware: (*TILES, TILES[0])

    def launching(name: str) -> Any:
        def launch(*tensors: Any, choice: Tile | None = None) -> Any:
            module.ran.append((name, choice))
            return getattr(reference, name)(*tensors)

        return launch

    for name in ("forward", "grad_input", "grad_scales"):
        setattr(module, name, launching(name))
    monkeypatch.setitem(BACKENDS, "tiled", ("tests.tune.conftest", ()))
    monkeypatch.setitem(choice._loaded, "tiled", module)
    return module
