"""Made-up entries, and the process that has them for the user's part."""

from __future__ import annotations

import json
from typing import Any

import torch

from rlrr_kernels.backends import choice, tuned
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.tuned import FORMAT, Entry, Where

CPU = torch.device("cpu")
WHERE = Where("cpu", None, None, None)
TILE = {"block_m": 64, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2, "splits": 1}
PROBLEM = Problem("forward", 1000, 768, 3072, 1, torch.float32, torch.float32)
SHAPE = {"n": 768, "k": 3072, "groups": 1}
ANY = {"n": None, "k": None, "groups": None}


def entry(first: int = 1000, last: int | None = 0, backend: str = "reference", **changes: Any) -> Entry:
    """Of :data:`PROBLEM` on any CPU; ``last`` 0: ``first`` alone."""
    whole: dict[str, Any] = {"where": WHERE, "kernel": "forward", "tf32": False, "backend": backend, **SHAPE}
    whole |= {"dtype": torch.float32, "weight_dtype": torch.float32, "tokens": (first, first if last == 0 else last)}
    return Entry(**whole | changes)


def file_of(path: Any, *entries: Entry) -> Any:
    """A file with these entries."""
    path.write_text(json.dumps({"format": FORMAT, "entries": [one.to_json() for one in entries]}))
    return path


def forget() -> None:
    """Nothing is read or chosen yet."""
    tuned.reload()
    choice._plans.clear()
