"""Made-up entries, and files of them."""

from __future__ import annotations

import json
from typing import Any

import torch

from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.tuned import FORMAT, Entry

CPU = torch.device("cpu")
TILE = {"block_m": 64, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2, "splits": 1}
PROBLEM = Problem("forward", 1000, 768, 3072, 1, torch.float32, torch.float32)


def entry(first: int = 1000, last: float | None = None, backend: str = "reference", **changes: Any) -> Entry:
    """Return an entry for :data:`PROBLEM` on any CPU; without ``last`` it holds for ``first`` alone."""
    whole: dict[str, Any] = {"device": "cpu", "where": None, "kernel": "forward", "tf32": False, "backend": backend}
    whole |= {"dtype": torch.float32, "weight_dtype": torch.float32}
    whole |= {"layer": (768, 3072, 1), "tokens": (first, first if last is None else last)}
    return Entry(**whole | changes)


def file_of(path: Any, *entries: Entry) -> Any:
    """Write a file with these entries."""
    path.write_text(json.dumps({"format": FORMAT, "entries": [one.to_json() for one in entries]}))
    return path
