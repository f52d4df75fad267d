"""The candidate tiles of each kernel, read from ``tiles_table.json``.

The file is written by ``python -m benchmarks.search``, which compiles many tiles for
each architecture without a GPU and keeps the few that the model of ``cost.py`` would
choose for some shape. What a candidate costs was counted in its machine code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path as File
from typing import Any, Literal

Arithmetic = Literal["half", "tf32", "ieee"]

#: The two products with W'.
Product = Literal["forward", "grad_input"]
Kernel = Literal["forward", "grad_input", "grad_scales"]

#: How tiles are loaded: whole boxes by the copy engine; 16-byte vectors; or, where strides
#: or sizes allow neither, element by element, which holds an address for each element.
Path = Literal["boxes", "vectors", "elements"]

FILE = File(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Config:
    """A kernel's choice, in the kernels' own letters.

    ``splits`` (forward and grad_input): programs that share the sum of one output tile. The sum's steps (of
    ``block_k`` over K in the forward, of ``block_n`` over N in grad_input, group after group) are cut so that
    split s takes steps ``[s * per, min((s + 1) * per, steps))`` with ``per = ceil(steps / splits)``. No split
    is empty: ``splits == ceil(steps / per)``. Where splits > 1 each writes a float32 partial ``[M, N]``
    (forward) or ``[M, K]`` (grad_input), all of them within ``WORKSPACE_BYTES``, and a second kernel adds
    them in order of s.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


@dataclass(frozen=True)
class Tile:
    """One candidate, and what its machine code needs. A step is one pass of the loop over the sum.

    ``registers``: of a thread. ``shared``: bytes of shared memory of a block. ``tensor_columns``: of tensor
    memory (sm_100), of 512. ``slots``: cycles for which one warp occupies its scheduler in a step: its
    instructions, or the pipe that takes longer for them. ``shared_bytes``: through shared memory, a block and
    step, the copies that fill it included. ``waits``: barriers and waits of a step. ``outside``: instructions
    before and after the loop.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int
    shared: int
    tensor_columns: int
    slots: int
    shared_bytes: int
    waits: int
    outside: int

    def config(self, splits: int = 1) -> Config:
        """As the kernels take it."""
        return Config(self.block_m, self.block_n, self.block_k, self.num_warps, self.num_stages, splits)


def row_name(kind: Arithmetic, path: Path, weight_size: int) -> str:
    """The row that serves an arithmetic, a load path and W's bytes an element.

    Only half-precision x meets W of two sizes in the table: a float32 x with a 16-bit W is served by the
    tiles of a float32 W, whose loads are the larger ones.
    """
    size = weight_size if kind == "half" else 4
    return f"{kind}/{size} {path}"


@lru_cache(maxsize=1)
def _rows() -> dict[str, dict[str, dict[str, list[dict[str, Any]]]]]:
    rows: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = json.loads(FILE.read_text())["tiles"]
    return rows


@lru_cache(maxsize=512)
def tiles(architecture: str, kernel: Kernel, kind: Arithmetic, path: Path, weight_size: int) -> tuple[Tile, ...]:
    """Candidates of a kernel on an architecture such as ``"sm_90"``; raises KeyError where there is no such row."""
    return tuple(Tile(**tile) for tile in _rows()[architecture][kernel][row_name(kind, path, weight_size)])
