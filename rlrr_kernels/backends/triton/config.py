"""Which tile each kernel uses: a table of candidates and a model of their cost, no tuning at first call.

``tiles_table.py`` holds the candidates, ``cost.py`` predicts their times; here the least time is
chosen. Every number is a function of shapes, dtypes and :class:`Device`, so tests
choose for made-up devices, and the same shapes give the same sums, bit for bit, on
the same device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, overload

import torch

from rlrr_kernels.backends.triton import compiler, cost, tiles_table
from rlrr_kernels.backends.triton.cost import Device, Prediction
from rlrr_kernels.backends.triton.tiles_table import Arithmetic, Config, Kernel, Path, Product, Tile

__all__ = [
    "EPILOGUE_BYTES",
    "GROUP_STEP",
    "WORKSPACE_BYTES",
    "Arithmetic",
    "Choice",
    "Config",
    "Device",
    "Kernel",
    "Path",
    "Product",
    "Tile",
    "arithmetic",
    "candidates",
    "choices",
    "copy_pays",
    "cuda_device",
    "fitting_tiles",
    "forward_config",
    "grad_input_config",
    "grad_scales_config",
    "ranked",
]

#: Sums are split no further once their partial sums take this many bytes. Where one split of grad_scales takes
#: more (about N * K / 32 bytes), it works through slices of W's rows, which the model does not know of.
WORKSPACE_BYTES = 1_900_000

#: Groups of a multiple of this many rows are whole steps of grad_input's sum, whatever its tile.
GROUP_STEP = 64

#: Shared memory kept free of pipeline stages where a GPU has less of it than the table's architecture.
EPILOGUE_BYTES = 16 * 1024


def arithmetic(dtype: torch.dtype, allow_tf32: bool) -> Arithmetic:
    """How products of ``dtype`` are computed."""
    if dtype is not torch.float32:
        return "half"
    return "tf32" if allow_tf32 else "ieee"


def _fit(kernel: Kernel, tile: Tile, x_size: int, weight_size: int, device: Device) -> Tile | None:
    """The tile with as many of its pipeline stages as fit in shared memory, or None under two."""
    if tile.shared <= device.shared_memory:
        return tile
    stage = cost.stage_bytes(kernel, tile, x_size, weight_size)
    stages = min(tile.num_stages, (device.shared_memory - EPILOGUE_BYTES) // stage)
    if stages < 2:
        return None
    return replace(tile, num_stages=stages, shared=stages * stage + EPILOGUE_BYTES)


@lru_cache(maxsize=512)
def fitting_tiles(
    kernel: Kernel, kind: Arithmetic, path: Path, x_size: int, weight_size: int, device: Device
) -> tuple[Tile, ...]:
    """The table's candidates that fit in the device's shared memory; sizes of an element in bytes."""
    table = tiles_table.tiles(cost.table_part(device), kernel, kind, path, weight_size)
    fitted = [_fit(kernel, tile, x_size, weight_size, device) for tile in table]
    found = tuple(tile for tile in fitted if tile)
    if not found:
        raise ValueError(
            f"device: no tile of {kernel} fits in its {device.shared_memory} bytes of shared memory a block; "
            f"the smallest of {kind} by {path} needs {min(t.shared for t in table)}"
        )
    return found


def _cuts(steps: int, most: int) -> list[int]:
    """1, and numbers of splits up to ``most`` that differ in the steps of a split, normalised: none is empty."""
    shares = {math.ceil(steps / splits) for splits in range(1, max(1, min(most, steps)) + 1)}
    return sorted({math.ceil(steps / share) for share in shares})


@dataclass(frozen=True)
class Choice:
    """A config with what it is predicted to take; ``split_tokens``: tokens of a split of grad_scales, otherwise 0."""

    prediction: Prediction
    config: Config
    split_tokens: int = 0


def choices(
    kernel: Kernel,
    tile: Tile,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    x_size: int,
    weight_size: int,
    device: Device,
) -> list[Choice]:
    """What one tile can do, split in every sensible way, best predicted first; sizes of an element in bytes.

    Products are split only where tiles are fewer than multiprocessors; grad_scales to three waves of
    programs at most. :data:`WORKSPACE_BYTES` bounds both.
    """
    what = (m, n, k, groups, kind, x_size, weight_size, device)
    if kernel == "grad_scales":
        steps = math.ceil(m / tile.block_m)
        tiles = groups * math.ceil(n // groups / tile.block_n) * math.ceil(k / tile.block_k)
        bound = WORKSPACE_BYTES // cost.scales_partial_bytes(tile, n, k, groups)
        cuts = _cuts(steps, min(bound, 3 * device.multiprocessors // tiles))
        tokens = [math.ceil(steps / splits) * tile.block_m for splits in cuts]
        found = [Choice(cost.predict_scales(tile, t, *what), tile.config(), t) for t in tokens]
    else:
        partial = 4 * m * (n if kernel == "forward" else k)
        few = cost.product_programs(kernel, tile, m, n, k, groups) < device.multiprocessors
        cuts = _cuts(cost.product_steps(kernel, tile, n, k, groups), WORKSPACE_BYTES // partial if few else 1)
        found = [Choice(cost.predict_product(kernel, tile, s, *what), tile.config(s)) for s in cuts]
    return sorted(found, key=lambda choice: choice.prediction.seconds)


@lru_cache(maxsize=4096)
def ranked(
    kernel: Kernel,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: Path,
    x_size: int,
    weight_size: int,
    device: Device,
) -> tuple[Choice, ...]:
    """Every choice that fits the device, best predicted first; ties go to the earlier tile and the fewer splits."""
    found = [
        choice
        for tile in fitting_tiles(kernel, kind, path, x_size, weight_size, device)
        for choice in choices(kernel, tile, m, n, k, groups, kind, x_size, weight_size, device)
    ]
    return tuple(sorted(found, key=lambda choice: choice.prediction.seconds))


def copy_pays(
    kernel: Kernel,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: Path,
    better: Path,
    x_size: int,
    weight_size: int,
    elements: int,
    device: Device,
) -> bool:
    """Whether copying so many elements of x and dy first, to load tiles by ``better`` and not ``path``, is faster."""
    now, then = (
        ranked(kernel, m, n, k, groups, kind, by, x_size, weight_size, device)[0].prediction.seconds
        for by in (path, better)
    )
    return then + cost.copy_seconds(elements * x_size, device) < now


def forward_config(
    m: int, n: int, k: int, groups: int, kind: Arithmetic, path: Path, x_size: int, weight_size: int, device: Device
) -> Config:
    """Choice for ``forward_kernel`` with x ``[m, k]`` and W ``[n, k]``; sizes of an element in bytes."""
    return ranked("forward", m, n, k, groups, kind, path, x_size, weight_size, device)[0].config


def grad_input_config(
    m: int, n: int, k: int, groups: int, kind: Arithmetic, path: Path, x_size: int, weight_size: int, device: Device
) -> Config:
    """Choice for ``grad_input_kernel`` with dy ``[m, n]`` and W ``[n, k]``; sizes of an element in bytes."""
    return ranked("grad_input", m, n, k, groups, kind, path, x_size, weight_size, device)[0].config


def grad_scales_config(
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: Path,
    x_size: int,
    device: Device,
    weight_size: int | None = None,
) -> tuple[Config, int]:
    """Choice for ``grad_scales_kernel`` and the tokens each of its splits sums over; sizes of an element in bytes.

    ``weight_size`` is x's unless given. More splits fill idle multiprocessors; each costs an epilogue and partial
    sums, which :data:`WORKSPACE_BYTES` bounds.
    """
    best = ranked("grad_scales", m, n, k, groups, kind, path, x_size, weight_size or x_size, device)[0]
    return best.config, best.split_tokens


@overload
def candidates(
    kernel: Product,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: Path,
    x_size: int,
    weight_size: int,
    device: Device,
) -> list[Config]: ...
@overload
def candidates(
    kernel: Literal["grad_scales"],
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: Path,
    x_size: int,
    weight_size: int,
    device: Device,
) -> list[tuple[Config, int]]: ...
def candidates(
    kernel: Kernel,
    m: int,
    n: int,
    k: int,
    groups: int,
    kind: Arithmetic,
    path: Path,
    x_size: int,
    weight_size: int,
    device: Device,
) -> list[Config] | list[tuple[Config, int]]:
    """Every choice that fits the device, sensible splits included, best predicted first.

    Configs for the two products; for grad_scales pairs (Config, tokens of one split), as
    :func:`grad_scales_config` returns them. The first is the heuristic's. Raises ValueError
    where no tile fits in the device's shared memory.
    """
    found = ranked(kernel, m, n, k, groups, kind, path, x_size, weight_size, device)
    if kernel == "grad_scales":
        return [(choice.config, choice.split_tokens) for choice in found]
    return [choice.config for choice in found]


@lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    """Read a GPU's properties once. Rates are reported in kHz, buses in bits; memory moves twice a clock."""
    p: Any = torch.cuda.get_device_properties(index)  # torch's stubs differ in what they know of it
    bus = getattr(p, "memory_clock_rate", 0) * 1e3 * 2 * getattr(p, "memory_bus_width", 0) / 8
    return Device(
        capability=(p.major, p.minor),
        multiprocessors=p.multi_processor_count,
        shared_memory=p.shared_memory_per_block_optin,
        clock_hz=getattr(p, "clock_rate", 0) * 1e3,
        l2_bytes=getattr(p, "L2_cache_size", 0),
        memory_bandwidth=bus,
        keeps_operands=compiler.keeps_operands(),
    )
