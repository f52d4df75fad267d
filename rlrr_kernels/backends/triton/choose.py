"""Which tile a plain kernel uses: a table of a few for each kind of GPU, and one rule.

A tile is ``BLOCK_M x BLOCK_N x BLOCK_K``; the letters are the problem's: M tokens, N out features, K in features. All
of them compile without spills for their GPUs with every supported Triton (``tests/backends/triton/test_compile.py``).
The rule counts waves: how many tiles a multiprocessor works through, and what one takes, in units of its products.
Nothing here was timed: ``rlrr-tune`` measures, and what it finds comes before the rule
(:mod:`rlrr_kernels.backends.tuned`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from operator import itemgetter
from typing import Any, Literal

import torch

from rlrr_kernels.backends.problem import Pass, Problem
from rlrr_kernels.backends.triton.start import ceil_div

#: How products are computed: 16-bit operands, float32 rounded to TF32, float32 as it is.
Arithmetic = Literal["half", "tf32", "ieee"]

#: Sums are split no further once their partial sums take this many bytes. Where one split of grad_scales takes
#: more (about N * K / 32 bytes), it works through slices of W's rows.
WORKSPACE_BYTES = 1_900_000


@dataclass(frozen=True)
class Device:
    """A GPU: compute capability, number of multiprocessors, bytes of shared memory that a block may have."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int


@dataclass(frozen=True)
class Choice:
    """A tile, and into how many shares its sum is split.

    A share of ``splits`` is so many steps of the sum, of BLOCK_K (forward), BLOCK_N (grad_input) or BLOCK_M
    (grad_scales), that none is empty: :func:`shares`. Partial sums of the shares are added up in one order.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1


def _tiles(*sizes: tuple[int, int, int, int, int]) -> tuple[Choice, ...]:
    return tuple(Choice(*each) for each in sizes)


#: Of tensors that load 16 bytes at a time: kind of GPU -> pass, arithmetic -> tiles, large ones first.
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

#: Of all other tensors, on every GPU: an address for each element leaves few registers.
MASKED: dict[Pass, tuple[Choice, ...]] = {
    "forward": _tiles((64, 64, 16, 8, 2), (64, 32, 16, 4, 2)),
    "grad_input": _tiles((64, 32, 64, 8, 2), (64, 16, 32, 4, 2)),
    "grad_scales": _tiles((16, 64, 64, 4, 2), (16, 64, 32, 4, 2)),
}

#: Tiles that spill where W is wider than x -> those in their place.
OF_A_WIDER_W = {
    Choice(256, 128, 64, 8, 3): Choice(128, 128, 64, 8, 3),
    Choice(64, 128, 256, 8, 3): Choice(64, 128, 128, 8, 4),
}

#: On Hopper ``wgmma`` transposes no float32: dy^T would stand in registers, which Triton before 3.9 overwrites while
#: the product still reads them (:mod:`tests.hazards`). Fewer rows than a ``wgmma`` has are multiplied by ``mma.sync``.
HOPPER_TF32_SCALES = _tiles((16, 32, 128, 4, 4), (16, 32, 64, 4, 2))

#: What a tile costs besides its products, all in products of one multiprocessor (some thousand a cycle): loading a row
#: or column of its operands for a step, steps that fill the pipeline and store the result, the second kernel of a split
#: sum, and each byte of partial sums.
_EDGE, _STEPS, _SECOND_KERNEL, _PARTIAL_BYTE = 96, 6, 5_000_000, 0.6


def arithmetic(problem: Problem) -> Arithmetic:
    """How a problem's products are computed."""
    if problem.dtype is not torch.float32:
        return "half"
    return "tf32" if problem.tf32 else "ieee"


def tiles(problem: Problem, device: Device, aligned: bool) -> tuple[Choice, ...]:
    """The tiles for a problem on a device; ``aligned``: whether all tensors load 16 bytes at a time."""
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


#: Kind of GPU -> the shared memory of a block that it has at least, in bytes.
_SHARED = {"large": 220 * 1024, "medium": 160 * 1024}


def _sum_block(kernel: Pass, tile: Choice) -> int:
    return {"forward": tile.block_k, "grad_input": tile.block_n, "grad_scales": tile.block_m}[kernel]


def stage_bytes(problem: Problem, tile: Choice) -> int:
    """Shared memory of one step's operands."""
    x_size, weight_size = problem.dtype.itemsize, problem.weight_dtype.itemsize
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    if problem.kernel == "grad_scales":
        return x_size * m * (n + k)
    return x_size * m * _sum_block(problem.kernel, tile) + weight_size * n * k


def _fit(problem: Problem, tile: Choice, device: Device) -> Choice:
    """With as many stages as fit; W' takes another buffer where a product reads it from shared memory."""
    rescaled = 0 if problem.kernel == "grad_scales" else problem.dtype.itemsize * tile.block_n * tile.block_k
    room = (device.shared_memory - rescaled) // stage_bytes(problem, tile)
    return tile if room >= tile.num_stages else replace(tile, num_stages=room)


def steps(problem: Problem, tile: Choice) -> int:
    """Steps of a tile's sum, all shares together."""
    if problem.kernel == "grad_input":  # no step crosses into the next group
        return problem.groups * ceil_div(problem.n // problem.groups, tile.block_n)
    return ceil_div(problem.k if problem.kernel == "forward" else problem.m, _sum_block(problem.kernel, tile))


def shares(steps: int, splits: int) -> tuple[int, int]:
    """Shares of a sum of so many steps, none of them empty, and the steps of each (of the last: at most)."""
    share = ceil_div(steps, splits)
    return ceil_div(steps, share), share


def programs(problem: Problem, tile: Choice) -> int:
    """Tiles of the result, of one share."""
    rows = problem.groups * ceil_div(problem.n // problem.groups, tile.block_n)
    if problem.kernel == "forward":
        return ceil_div(problem.m, tile.block_m) * rows
    columns = ceil_div(problem.k, tile.block_k)
    return columns * (ceil_div(problem.m, tile.block_m) if problem.kernel == "grad_input" else rows)


def partial_bytes(problem: Problem, tile: Choice) -> int:
    """Partial sums of one share."""
    m, n, k, groups = problem.m, problem.n, problem.k, problem.groups
    if problem.kernel != "grad_scales":
        return 4 * m * (n if problem.kernel == "forward" else k)
    row_tiles = groups * ceil_div(n // groups, tile.block_n)
    return 4 * (n * (ceil_div(k, tile.block_k) + 1) + row_tiles * k)


def _costs(problem: Problem, tile: Choice, device: Device) -> Iterator[tuple[float, Choice, int]]:
    """What a tile costs in one share, in two, and in as many as fill one, two or three waves of programs.

    Products are split only where tiles are fewer than multiprocessors.
    """
    scales = problem.kernel == "grad_scales"
    count, tiles, partial = steps(problem, tile), programs(problem, tile), partial_bytes(problem, tile)
    room = WORKSPACE_BYTES // partial if scales or tiles < device.multiprocessors else 1
    depth = _sum_block(problem.kernel, tile)
    sides = tile.block_m + tile.block_n + tile.block_k - depth
    step = tile.block_m * tile.block_n * tile.block_k + _EDGE * sides * depth
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
    """The cheapest first; ties go to the earlier tile and the fewer shares."""
    found = [each for tile in tiles(problem, device, aligned) for each in _costs(problem, tile, device)]
    return sorted(found, key=itemgetter(0))


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device, aligned: bool = True) -> Choice:
    """The rule's choice."""
    _, tile, splits = _ranked(problem, device, aligned)[0]
    return replace(tile, splits=splits)


def candidates(problem: Problem, device: Device, aligned: bool = True) -> tuple[Choice, ...]:
    """What ``rlrr-tune`` measures: the rule's choice, then the others in its order."""
    return tuple(replace(tile, splits=splits) for _, tile, splits in _ranked(problem, device, aligned))


def refusal(problem: Problem, choice: Choice, device: Device) -> str | None:
    """Why a choice, as from a file that was edited, cannot be launched; None if it can."""
    *blocks, warps, stages, splits = astuple(choice)
    if not all(block in (16, 32, 64, 128, 256) for block in blocks) or warps not in (1, 2, 4, 8):
        return "no kernel is compiled for such blocks or warps"
    if not 1 <= stages <= 10 or (stages - 1) * stage_bytes(problem, choice) > device.shared_memory:
        return f"its {stages} stages do not fit in {device.shared_memory} bytes"
    if splits < 1 or (splits > 1 and splits * partial_bytes(problem, choice) > 2 * WORKSPACE_BYTES):
        return f"{splits} splits take more than the workspace"
    tf32_scales = problem.kernel == "grad_scales" and arithmetic(problem) == "tf32"
    if tf32_scales and device.capability[0] == 9 and choice.block_n >= 64:
        return "its operand would stand in registers"
    return None


@lru_cache(maxsize=64)
def cuda_device(index: int) -> Device:
    """Read a GPU's properties once."""
    p: Any = torch.cuda.get_device_properties(index)  # torch's stubs differ in what they know of it
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)
