"""Which tile each kernel uses: a table of candidates and a cost estimate, no tuning at first call.

A product is seen as tokens x features x depth, where depth is summed over: the
forward sums over K, grad_input over N, grad_scales over M. Every number here is
a function of shapes, dtypes and :class:`Device`, so tests choose for made-up
devices, and the same shapes give the same sums, bit for bit, on the same device.

The efficiencies are estimates from disassembled loops (tensor-core cycles over
issue slots, at most 1), not measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch

Arithmetic = Literal["half", "tf32", "ieee"]

#: The two products with W'.
Product = Literal["forward", "grad_input"]

#: How tiles are loaded: whole boxes by the copy engine; 16-byte vectors; or, where strides
#: or sizes allow neither, element by element, which holds an address for each element.
Path = Literal["boxes", "vectors", "elements"]

#: The tokens are split no further once the partial sums of grad_scales take this many bytes a layer. One
#: split of a very large layer can take more: about N * K / 32 bytes.
WORKSPACE_BYTES = 2 * 2**20

#: Groups of a multiple of this many rows are whole steps of grad_input's sum, whatever its tile.
GROUP_STEP = 64

#: Shared memory kept free of pipeline stages, for barriers and layout changes.
EPILOGUE_BYTES = 16 * 1024

#: What reducing a finished tile of G against W costs, in tokens of its main loop.
EPILOGUE_TOKENS = 256


@dataclass(frozen=True)
class Device:
    """What a choice depends on. ``shared_memory``: bytes one block may opt in to."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def has_wgmma(self) -> bool:
        """Hopper and data-centre Blackwell: tensor cores that read shared memory, fed by the copy engine (TMA)."""
        return 9 <= self.capability[0] < 12


@dataclass(frozen=True)
class Config:
    """A kernel's compile-time choice, in the kernels' own letters."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tile:
    """One candidate: tile sizes, warps, pipeline depth, and the share of the peak it can reach."""

    tokens: int
    features: int
    depth: int
    warps: int
    stages: int
    efficiency: float

    def config(self, kernel: Product | Literal["grad_scales"]) -> Config:
        """In the kernel's letters: grad_input sums over N and its features are K."""
        if kernel == "grad_input":
            return Config(self.tokens, self.depth, self.features, self.warps, self.stages)
        return Config(self.tokens, self.features, self.depth, self.warps, self.stages)


# forward and grad_input; wide over tokens, since every rescaled element of W then serves more of them
_WGMMA_PRODUCT = (
    Tile(128, 128, 64, 8, 4, 0.90),
    Tile(128, 64, 64, 4, 4, 0.90),
    Tile(64, 64, 64, 4, 4, 0.47),
)
_PRODUCT_TILES: dict[tuple[Arithmetic, bool, Path], tuple[Tile, ...]] = {
    ("half", True, "boxes"): (Tile(256, 128, 64, 8, 3, 1.00), *_WGMMA_PRODUCT),
    ("half", True, "vectors"): _WGMMA_PRODUCT,
    ("half", False, "vectors"): (
        Tile(128, 128, 32, 8, 4, 1.00),
        Tile(128, 64, 32, 4, 4, 0.85),
        Tile(64, 64, 32, 4, 4, 0.60),
    ),
    ("tf32", True, "boxes"): (Tile(128, 128, 32, 8, 3, 1.00), Tile(64, 64, 32, 4, 3, 0.50)),
    ("tf32", True, "vectors"): (Tile(128, 128, 32, 8, 3, 1.00), Tile(64, 64, 32, 4, 3, 0.50)),
    ("tf32", False, "vectors"): (Tile(128, 128, 32, 8, 3, 1.00), Tile(64, 64, 32, 4, 3, 0.60)),
}

# grad_scales: "tokens" is the depth of a step here, the tile of G is features (N) x depth (K)
_SCALES_TILES: dict[tuple[Arithmetic, bool, Path], tuple[Tile, ...]] = {
    ("half", True, "boxes"): (
        Tile(64, 128, 256, 8, 3, 1.00),
        Tile(64, 128, 128, 8, 4, 0.90),
        Tile(64, 64, 64, 4, 4, 0.50),
    ),
    ("half", True, "vectors"): (Tile(64, 128, 128, 8, 4, 1.00), Tile(64, 64, 64, 8, 4, 0.50)),
    ("half", False, "vectors"): (Tile(32, 128, 128, 8, 4, 1.00), Tile(32, 64, 64, 4, 4, 0.60)),
    ("tf32", True, "boxes"): (Tile(32, 128, 128, 8, 3, 1.00), Tile(32, 64, 64, 4, 3, 0.50)),
    ("tf32", True, "vectors"): (Tile(32, 128, 128, 8, 3, 1.00), Tile(32, 64, 64, 4, 3, 0.50)),
    ("tf32", False, "vectors"): (Tile(32, 128, 128, 8, 3, 1.00), Tile(32, 64, 64, 4, 3, 0.60)),
}

# plain float32 has no tensor cores to feed, and loads by the element no registers to spare
_IEEE_PRODUCT: dict[Product, tuple[Tile, ...]] = {
    "forward": (Tile(128, 64, 16, 8, 3, 1.00), Tile(64, 64, 16, 4, 3, 0.80)),
    "grad_input": (Tile(128, 64, 16, 8, 3, 1.00), Tile(64, 64, 32, 8, 2, 0.80)),
}
_IEEE_SCALES: tuple[Tile, ...] = (Tile(16, 128, 64, 8, 3, 1.00), Tile(16, 64, 64, 4, 3, 0.80))
_ELEMENTS_PRODUCT: dict[Product, tuple[Tile, ...]] = {
    "forward": (Tile(64, 64, 16, 8, 2, 1.00),),
    "grad_input": (Tile(64, 64, 32, 8, 2, 1.00),),
}
_ELEMENTS_SCALES: tuple[Tile, ...] = (Tile(16, 64, 64, 8, 2, 1.00),)


def arithmetic(dtype: torch.dtype, allow_tf32: bool) -> Arithmetic:
    """How products of ``dtype`` are computed."""
    if dtype is not torch.float32:
        return "half"
    return "tf32" if allow_tf32 else "ieee"


def _fit(tile: Tile, stage_bytes: int, device: Device) -> Tile | None:
    """The tile with as many of its pipeline stages as fit beside the epilogue, or None under two."""
    stages = min(tile.stages, (device.shared_memory - EPILOGUE_BYTES) // stage_bytes)
    return replace(tile, stages=stages) if stages >= 2 else None


def product_tiles(
    product: Product, kind: Arithmetic, path: Path, x_size: int, weight_size: int, device: Device
) -> list[Tile]:
    """Candidates of forward or grad_input that fit in the device's shared memory."""
    if path == "elements":
        tiles = _ELEMENTS_PRODUCT[product]
    elif kind == "ieee":
        tiles = _IEEE_PRODUCT[product]
    else:
        tiles = _PRODUCT_TILES[kind, device.has_wgmma, path]
    fitted = [_fit(t, t.depth * (t.tokens * x_size + t.features * weight_size), device) for t in tiles]
    return [tile for tile in fitted if tile]


def scales_tiles(kind: Arithmetic, path: Path, x_size: int, device: Device) -> list[Tile]:
    """Candidates of grad_scales that fit in the device's shared memory."""
    if path == "elements":
        tiles = _ELEMENTS_SCALES
    elif kind == "ieee":
        tiles = _IEEE_SCALES
    else:
        tiles = _SCALES_TILES[kind, device.has_wgmma, path]
    fitted = [_fit(t, t.tokens * (t.features + t.depth) * x_size, device) for t in tiles]
    return [tile for tile in fitted if tile]


def _product_tile(tokens: int, blocks: int, block_features: int, tiles: list[Tile], device: Device) -> Tile:
    """Least estimated time: waves over the multiprocessors x work of a tile / its efficiency."""

    def cost(tile: Tile) -> float:
        count = math.ceil(tokens / tile.tokens) * blocks * math.ceil(block_features / tile.features)
        return math.ceil(count / device.multiprocessors) * tile.tokens * tile.features / tile.efficiency

    return min(tiles, key=cost)


@lru_cache(maxsize=4096)
def forward_config(
    m: int, n: int, k: int, groups: int, kind: Arithmetic, path: Path, x_size: int, weight_size: int, device: Device
) -> Config:
    """Tile of ``forward_kernel`` for x ``[m, k]`` and W ``[n, k]``; sizes of an element in bytes."""
    tiles = product_tiles("forward", kind, path, x_size, weight_size, device)
    return _product_tile(m, groups, n // groups, tiles, device).config("forward")


@lru_cache(maxsize=4096)
def grad_input_config(
    m: int, n: int, k: int, groups: int, kind: Arithmetic, path: Path, x_size: int, weight_size: int, device: Device
) -> Config:
    """Tile of ``grad_input_kernel`` for dy ``[m, n]`` and W ``[n, k]``; sizes of an element in bytes."""
    tiles = product_tiles("grad_input", kind, path, x_size, weight_size, device)
    return _product_tile(m, 1, k, tiles, device).config("grad_input")


@lru_cache(maxsize=4096)
def grad_scales_config(
    m: int, n: int, k: int, groups: int, kind: Arithmetic, path: Path, x_size: int, device: Device
) -> tuple[Config, int]:
    """Tile of ``grad_scales_kernel`` and the tokens each of its splits sums over.

    More splits fill idle multiprocessors; each costs an epilogue and partial
    sums, which :data:`WORKSPACE_BYTES` bounds.
    """
    choices = []
    for tile in scales_tiles(kind, path, x_size, device):
        n_tiles = groups * math.ceil(n // groups / tile.features)
        k_tiles = math.ceil(k / tile.depth)
        steps = math.ceil(m / tile.tokens)
        split_bytes = 4 * (k_tiles * n + n_tiles * k + n)
        most = max(1, min(steps, device.multiprocessors, WORKSPACE_BYTES // split_bytes))
        for splits in range(1, most + 1):
            waves = math.ceil(n_tiles * k_tiles * splits / device.multiprocessors)
            split_tokens = math.ceil(steps / splits) * tile.tokens
            cost = waves * (split_tokens + EPILOGUE_TOKENS) * tile.features * tile.depth / tile.efficiency
            choices.append((cost, tile, split_tokens))
    _, tile, split_tokens = min(choices, key=lambda choice: choice[0])
    return tile.config("grad_scales"), split_tokens


@lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    """Read a GPU's properties once."""
    p = torch.cuda.get_device_properties(index)
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)
