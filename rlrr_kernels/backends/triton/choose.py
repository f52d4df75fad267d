"""Chooses the tile of a plain kernel, from a table for each kind of GPU and by one cost model.

A tile is ``BLOCK_M x BLOCK_N x BLOCK_K``, of M tokens, N output features and K input features. All tiles of the table
compile without spills for their GPUs with every supported Triton (``tests/backends/triton/test_compile.py``). The cost
model counts waves: how many tiles a multiprocessor works through, and what each costs, in units of its products. It
rests on no measurement: ``rlrr-tune`` measures, and its results take precedence (:mod:`rlrr_kernels.backends.tuned`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal

import torch

from rlrr_kernels.backends.problem import Pass, Problem

#: How products are computed: 16-bit operands, float32 rounded to TF32, float32 as it is.
Arithmetic = Literal["half", "tf32", "ieee"]

#: Most bytes of partial sums. Sums are split no further than this allows. If a single split of grad_scales takes more
#: (it takes N * K / 21 bytes in the largest tiles), grad_scales processes slices of W's rows one after another.
WORKSPACE_BYTES = 1_900_000

#: (group, first row, end) of some rows of W.
Slice = tuple[int, int, int]


@dataclass(frozen=True)
class Device:
    """A GPU. ``shared_memory`` is the most that one block can have, in bytes."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class Choice:
    """A tile, and into how many shares its sum is split.

    A step of the sum is BLOCK_K (forward), BLOCK_N (grad_input) or BLOCK_M (grad_scales) terms. :func:`shares` says how
    many steps a share has. The partial sums of the shares are added in a fixed order.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up. ``triton.cdiv`` would take microseconds on the host."""
    return -(-a // b)


def _tiles(*sizes: tuple[int, int, int, int, int]) -> tuple[Choice, ...]:
    return tuple(Choice(*each) for each in sizes)


#: Tiles for tensors that can be loaded 16 bytes at a time, by kind of GPU, pass and arithmetic; large ones first.
ALIGNED: dict[str, dict[tuple[Pass, Arithmetic], tuple[Choice, ...]]] = {
    # 227 KB of shared memory: compute capability 9.0, 10.x
    "large": {
        ("forward", "half"): _tiles((256, 128, 64, 8, 3), (128, 64, 64, 8, 4), (32, 64, 64, 4, 4)),
        ("forward", "tf32"): _tiles((256, 64, 32, 8, 3), (128, 128, 32, 8, 3), (32, 64, 32, 4, 4)),
        ("forward", "ieee"): _tiles((128, 64, 16, 8, 3), (64, 64, 16, 4, 3), (32, 64, 16, 4, 3)),
        ("grad_input", "half"): _tiles((256, 64, 128, 8, 3), (128, 64, 128, 8, 3), (32, 64, 64, 4, 4)),
        ("grad_input", "tf32"): _tiles((256, 32, 128, 8, 3), (128, 32, 128, 8, 3), (32, 32, 64, 4, 4)),
        ("grad_input", "ieee"): _tiles((128, 16, 64, 8, 3), (64, 16, 64, 4, 3), (32, 16, 64, 4, 3)),
        ("grad_scales", "half"): _tiles((64, 128, 256, 8, 3), (64, 128, 128, 8, 4), (64, 64, 64, 4, 4)),
        ("grad_scales", "tf32"): _tiles((32, 128, 128, 8, 3), (32, 128, 64, 8, 3)),
        ("grad_scales", "ieee"): _tiles((16, 128, 64, 8, 3), (16, 64, 32, 4, 3)),
    },
    # 163 KB: 8.0, 8.7
    "medium": {
        ("forward", "half"): _tiles((128, 128, 32, 8, 4), (128, 64, 32, 4, 4), (64, 64, 32, 4, 4)),
        ("forward", "tf32"): _tiles((128, 128, 16, 8, 4), (64, 64, 32, 4, 3), (32, 64, 32, 4, 4)),
        ("forward", "ieee"): _tiles((128, 64, 16, 8, 3), (64, 64, 16, 4, 3), (32, 64, 16, 4, 3)),
        ("grad_input", "half"): _tiles((256, 32, 128, 8, 3), (128, 32, 64, 4, 4), (64, 32, 64, 4, 4)),
        ("grad_input", "tf32"): _tiles((128, 32, 128, 8, 4), (128, 32, 64, 4, 3), (64, 32, 64, 4, 3)),
        ("grad_input", "ieee"): _tiles((128, 16, 64, 8, 3), (64, 16, 64, 4, 3), (32, 16, 64, 4, 3)),
        ("grad_scales", "half"): _tiles((64, 128, 128, 8, 3), (32, 64, 64, 4, 4)),
        ("grad_scales", "tf32"): _tiles((32, 128, 128, 8, 3), (32, 128, 64, 8, 3), (32, 64, 64, 4, 3)),
        ("grad_scales", "ieee"): _tiles((16, 128, 64, 8, 3), (16, 64, 32, 4, 3)),
    },
    # 99 KB: 8.6, 8.9, 12.x
    "small": {
        ("forward", "half"): _tiles((128, 128, 32, 8, 3), (64, 64, 32, 4, 4)),
        ("forward", "tf32"): _tiles((128, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
        ("forward", "ieee"): _tiles((128, 64, 16, 8, 3), (64, 64, 16, 4, 3), (32, 64, 16, 4, 3)),
        ("grad_input", "half"): _tiles((128, 32, 128, 8, 3), (128, 32, 64, 4, 4), (64, 32, 64, 4, 4)),
        ("grad_input", "tf32"): _tiles((128, 32, 64, 4, 3), (64, 32, 64, 4, 3)),
        ("grad_input", "ieee"): _tiles((128, 16, 64, 8, 3), (64, 16, 64, 4, 3), (32, 16, 64, 4, 3)),
        ("grad_scales", "half"): _tiles((32, 128, 128, 8, 4), (32, 64, 64, 8, 4)),
        ("grad_scales", "tf32"): _tiles((32, 128, 64, 8, 3), (32, 64, 64, 4, 3)),
        ("grad_scales", "ieee"): _tiles((16, 128, 64, 8, 3), (16, 64, 32, 4, 3)),
    },
}

#: Tiles for all other tensors, on every GPU: an address for each element leaves few registers.
MASKED: dict[Pass, tuple[Choice, ...]] = {
    "forward": _tiles((64, 64, 16, 8, 2), (64, 32, 16, 4, 2)),
    "grad_input": _tiles((64, 32, 64, 8, 2), (64, 16, 32, 4, 2)),
    "grad_scales": _tiles((16, 64, 64, 4, 2), (16, 64, 32, 4, 2)),
}

#: Tiles that spill if W has a wider dtype than x, and their replacements.
OF_A_WIDER_W = {
    Choice(256, 128, 64, 8, 3): Choice(128, 128, 64, 8, 3),
    Choice(64, 128, 256, 8, 3): Choice(64, 128, 128, 8, 4),
}

#: Tiles of grad_scales with TF32 on Hopper, small enough for ``mma.sync``. ``wgmma`` cannot transpose float32: dy^T
#: would be in registers, which Triton before 3.9 overwrites while the product still reads them (:mod:`tests.hazards`).
HOPPER_TF32_SCALES = _tiles((16, 32, 128, 4, 4), (16, 32, 64, 4, 2))

#: What a tile costs besides its products, in products of one multiprocessor (some thousand a cycle): loading a row or
#: column of its operands for a step; the steps that fill the pipeline and store the result, as a number of steps; the
#: second kernel of a split sum; and each byte of partial sums.
_EDGE, _STEPS, _SECOND_KERNEL, _PARTIAL_BYTE = 96, 6, 5_000_000, 0.6


def arithmetic(problem: Problem) -> Arithmetic:
    """Return how a problem's products are computed."""
    if problem.dtype is not torch.float32:
        return "half"
    return "tf32" if problem.tf32 else "ieee"


def in_registers(problem: Problem) -> bool:
    """Return whether forward and grad_input form W' in each tile, or, of a larger rank, a panel for all tokens.

    An element of 1 + U V takes ``rank`` multiply-adds. A tile of 128 tokens hides few of them behind its products; a
    matrix unit that formed U V itself, to float32's precision, would spend as many products on that as on a tile.
    """
    return problem.kernel == "grad_scales" or problem.rank <= (8 if arithmetic(problem) == "ieee" else 4)


def du_rows(rank: int) -> int:
    """Return the number of rows of partial dU that a tile of grad_scales writes: a larger rank writes half a tile's."""
    return 1 if rank == 1 else 2


def most_partial_bytes(problem: Problem) -> int:
    """Return the most bytes of partial sums. Those of a wave of grad_scales' tiles grow with the rank."""
    return WORKSPACE_BYTES * (ceil_div(problem.rank, 8) if problem.kernel == "grad_scales" else 1)


def forming(problem: Problem) -> int:
    """Return what forming an element of U V costs, in products: a matrix unit does 16 while others do one."""
    return problem.rank * (1 if arithmetic(problem) == "ieee" else 16)


def tiles(problem: Problem, device: Device, aligned: bool) -> tuple[Choice, ...]:
    """Return the tiles for a problem on a device. ``aligned``: whether all tensors can be loaded 16 bytes at a time."""
    if problem.kernel == "grad_scales" and arithmetic(problem) == "tf32" and device.capability[0] == 9:
        return HOPPER_TF32_SCALES[0 if aligned else 1 :]
    if not aligned:
        return MASKED[problem.kernel]
    kind = next((name for name, least in _SHARED.items() if device.shared_memory >= least), "small")
    found = ALIGNED[kind][problem.kernel, arithmetic(problem)]
    if problem.weight_dtype.itemsize > problem.dtype.itemsize:
        found = tuple(dict.fromkeys(OF_A_WIDER_W.get(tile, tile) for tile in found))
    fitted = (_fit(problem, tile, device) for tile in found)
    return tuple(tile for tile in fitted if tile.num_stages >= 2) or MASKED[problem.kernel]


#: Kind of GPU to the least shared memory of a block, in bytes.
_SHARED = {"large": 220 * 1024, "medium": 160 * 1024}


def _sum_block(kernel: Pass, tile: Choice) -> int:
    return {"forward": tile.block_k, "grad_input": tile.block_n, "grad_scales": tile.block_m}[kernel]


def stage_bytes(problem: Problem, tile: Choice) -> int:
    """Return the shared memory of one step's operands, in bytes."""
    x_size, weight_size = problem.dtype.itemsize, problem.weight_dtype.itemsize
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    if problem.kernel == "grad_scales":
        return x_size * m * (n + k)
    return x_size * m * _sum_block(problem.kernel, tile) + weight_size * n * k


def _fit(problem: Problem, tile: Choice, device: Device) -> Choice:
    """Return the tile with as many stages as fit. A product that reads W' from shared memory needs another buffer."""
    held = 0 if problem.kernel == "grad_scales" else problem.dtype.itemsize * tile.block_n * tile.block_k
    room = (device.shared_memory - held) // stage_bytes(problem, tile)
    return tile if room >= tile.num_stages else replace(tile, num_stages=room)


def steps(problem: Problem, tile: Choice) -> int:
    """Return the number of steps of a tile's sum, over all shares."""
    if problem.kernel == "grad_input":  # a step does not cross into the next group
        return problem.groups * ceil_div(problem.n // problem.groups, tile.block_n)
    return ceil_div(problem.k if problem.kernel == "forward" else problem.m, _sum_block(problem.kernel, tile))


def shares(steps: int, splits: int) -> tuple[int, int]:
    """Split a sum into at most ``splits`` shares, none of them empty.

    Returns:
        (number of shares, steps of each; the last may have fewer).
    """
    share = ceil_div(steps, splits)
    return ceil_div(steps, share), share


def programs(problem: Problem, tile: Choice) -> int:
    """Return the number of tiles of the result, for one share."""
    rows = problem.groups * ceil_div(problem.n // problem.groups, tile.block_n)
    if problem.kernel == "forward":
        return ceil_div(problem.m, tile.block_m) * rows
    columns = ceil_div(problem.k, tile.block_k)
    return columns * (ceil_div(problem.m, tile.block_m) if problem.kernel == "grad_input" else rows)


def partial_bytes(problem: Problem, tile: Choice) -> int:
    """Return the bytes of partial sums of one share."""
    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    if problem.kernel != "grad_scales":
        return 4 * m * (n if problem.kernel == "forward" else k)
    row_tiles = groups * ceil_div(n // groups, tile.block_n)
    rank = problem.rank
    return 4 * (n * (ceil_div(k, tile.block_k) * du_rows(rank) * rank + 1) + row_tiles * k * rank)


def _costs(problem: Problem, tile: Choice, device: Device) -> Iterator[tuple[float, Choice, int]]:
    """Yield (cost, tile, splits) for one share, for two, and for as many as fill one, two or three waves.

    Forward and grad_input are split only if there are fewer tiles than multiprocessors.
    """
    scales = problem.kernel == "grad_scales"
    count, tiles, partial = steps(problem, tile), programs(problem, tile), partial_bytes(problem, tile)
    room = most_partial_bytes(problem) // partial if scales or tiles < device.multiprocessors else 1
    depth = _sum_block(problem.kernel, tile)
    sides = tile.block_m + tile.block_n + tile.block_k - depth
    step = tile.block_m * tile.block_n * tile.block_k + _EDGE * sides * depth
    if problem.rank > 1 and not scales:
        step += forming(problem) * tile.block_n * tile.block_k
    filling = (waves * device.multiprocessors // tiles for waves in (1, 2, 3))
    for splits in dict.fromkeys(shares(count, max(1, min(most, room, count)))[0] for most in (1, 2, *filling)):
        share = ceil_div(count, splits)
        cost = float(ceil_div(tiles * splits, device.multiprocessors) * (share + _STEPS) * step)
        if splits > 1 and not scales:
            cost += _SECOND_KERNEL
        if splits > 1 or scales:
            cost += _PARTIAL_BYTE * splits * partial
        yield cost, tile, splits


def _ranked(problem: Problem, device: Device, aligned: bool) -> list[tuple[float, Choice, int]]:
    """Return (cost, tile, splits), the cheapest first; ties go to the earlier tile and to fewer shares."""
    found = [each for tile in tiles(problem, device, aligned) for each in _costs(problem, tile, device)]
    return sorted(found, key=itemgetter(0))


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device, aligned: bool = True) -> Choice:
    """Return the tile and splits that the cost model ranks first."""
    _, tile, splits = _ranked(problem, device, aligned)[0]
    return replace(tile, splits=splits)


def candidates(problem: Problem, device: Device, aligned: bool = True) -> tuple[Choice, ...]:
    """Return what ``rlrr-tune`` measures: all tiles and splits in the order of the cost model; none for a panel."""
    if not in_registers(problem):
        return ()
    return tuple(replace(tile, splits=splits) for _, tile, splits in _ranked(problem, device, aligned))


def refusal(problem: Problem, choice: Choice, device: Device) -> str | None:
    """Return why a choice, such as one from an edited file, cannot be launched, or None if it can."""
    *blocks, warps, stages, splits = astuple(choice)
    if not all(block in (16, 32, 64, 128, 256) for block in blocks) or warps not in (1, 2, 4, 8):
        return "no kernel is compiled for such blocks or warps"
    if not 1 <= stages <= 10 or (stages - 1) * stage_bytes(problem, choice) > device.shared_memory:
        return f"its {stages} stages do not fit in {device.shared_memory} bytes"
    if splits < 1 or (splits > 1 and splits * partial_bytes(problem, choice) > 2 * most_partial_bytes(problem)):
        return f"{splits} splits take more than the workspace"
    tf32_scales = problem.kernel == "grad_scales" and arithmetic(problem) == "tf32"
    if tf32_scales and device.capability[0] == 9 and choice.block_n >= 64:
        return "its operand would stand in registers"
    return None


@lru_cache(maxsize=1024)
def row_slices(
    n: int, k: int, groups: int, block_n: int, block_k: int, splits: int, limit: int, rank: int = 1
) -> tuple[Slice, ...]:
    """Cut W ``[n, k]`` into as few slices of rows as ``limit`` bytes of grad_scales' partial sums allow.

    A slice holds whole tiles, at least one, and never crosses a group.

    Returns:
        (group, first row, end) of each slice, in order; ``((0, 0, n),)`` if all rows fit.
    """
    group_rows = n // groups
    # partial sums of one row of tiles: dU and df for each of its rows, dV for each column
    tile_bytes = 4 * splits * (block_n * (ceil_div(k, block_k) * du_rows(rank) * rank + 1) + k * rank)
    if groups * ceil_div(group_rows, block_n) * tile_bytes <= limit:
        return ((0, 0, n),)
    rows = max(1, limit // tile_bytes) * block_n
    return tuple(
        (group, group * group_rows + first, group * group_rows + min(first + rows, group_rows))
        for group in range(groups)
        for first in range(0, group_rows, rows)
    )


@lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    """Return a GPU's properties, which are read once."""
    p: Any = torch.cuda.get_device_properties(index)  # the stubs of some versions of torch lack attributes
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)
