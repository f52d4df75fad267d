"""What the offline search tries: tiles, the rows of the table, and the shapes and GPUs it chooses for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from rlrr_kernels.backends.triton.config import Config, Device
from rlrr_kernels.backends.triton.tiles_table import Arithmetic, Kernel, Path, row_name

#: One GPU for each part of the table to compile for, with the least shared memory among those its rows serve.
#: Hopper has two, for compilers that can be trusted with wgmma's register operand and for those that cannot.
TARGETS: dict[str, Device] = {
    "sm_80": Device((8, 0), 108, 166_912),
    "sm_89": Device((8, 9), 142, 101_376),
    "sm_90": Device((9, 0), 132, 232_448),
    "sm_90 shared": Device((9, 0), 132, 232_448, keeps_operands=False),
    "sm_100": Device((10, 0), 148, 232_448),
    "sm_120": Device((12, 0), 170, 101_376),
}

#: GPUs by name, from their data sheets: what the choice is made for, and what ``benchmarks.model`` prints. ``shared``:
#: with a compiler that cannot be trusted with W' in registers.
GPUS: dict[str, tuple[str, Device]] = {
    "a100": ("sm_80", Device((8, 0), 108, 166_912, 1.410e9, 40 * 2**20, 2.039e12)),
    "a40": ("sm_89", Device((8, 6), 84, 101_376, 1.740e9, 6 * 2**20, 0.696e12)),
    "l40s": ("sm_89", Device((8, 9), 142, 101_376, 2.520e9, 96 * 2**20, 0.864e12)),
    "h100": ("sm_90", Device((9, 0), 132, 232_448, 1.980e9, 50 * 2**20, 3.350e12)),
    "h200": ("sm_90", Device((9, 0), 132, 232_448, 1.980e9, 50 * 2**20, 4.800e12)),
    "h100-shared": ("sm_90 shared", Device((9, 0), 132, 232_448, 1.980e9, 50 * 2**20, 3.350e12, keeps_operands=False)),
    "h200-shared": ("sm_90 shared", Device((9, 0), 132, 232_448, 1.980e9, 50 * 2**20, 4.800e12, keeps_operands=False)),
    "b200": ("sm_100", Device((10, 0), 148, 232_448, 1.965e9, 126 * 2**20, 8.000e12)),
    "rtx5090": ("sm_120", Device((12, 0), 170, 101_376, 2.407e9, 96 * 2**20, 1.792e12)),
}

#: (n, k, groups): the linears of ViT-B/16, ViT-L/16 and ViT-H/14, and of Swin-B's first and third stage.
LAYERS: dict[str, tuple[int, int, int]] = {
    "vit_b qkv": (2304, 768, 3),
    "vit_b proj": (768, 768, 1),
    "vit_b fc1": (3072, 768, 1),
    "vit_b fc2": (768, 3072, 1),
    "vit_l qkv": (3072, 1024, 3),
    "vit_l proj": (1024, 1024, 1),
    "vit_l fc1": (4096, 1024, 1),
    "vit_l fc2": (1024, 4096, 1),
    "vit_h qkv": (3840, 1280, 3),
    "vit_h fc1": (5120, 1280, 1),
    "vit_h fc2": (1280, 5120, 1),
    "swin_b qkv 1": (384, 128, 1),
    "swin_b fc1 3": (2048, 512, 1),
}
TOKENS = (1, 49, 197, 788, 1576, 3136, 6304, 12_608, 50_432)


@dataclass(frozen=True)
class Row:
    """A row of the table, and the tensors that stand for it when it is compiled."""

    kind: Arithmetic
    path: Path
    dtype: str
    weight_dtype: str

    @property
    def x_size(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def weight_size(self) -> int:
        return 4 if self.weight_dtype == "float32" else 2

    @property
    def name(self) -> str:
        return row_name(self.kind, self.path, self.weight_size)


KINDS: tuple[tuple[Arithmetic, str, str], ...] = (
    ("half", "bfloat16", "bfloat16"),
    ("half", "float16", "float32"),
    ("tf32", "float32", "float32"),
    ("ieee", "float32", "float32"),
)


def rows(device: Device) -> list[Row]:
    """Rows that the launcher can ask for on this GPU."""
    return [
        Row(kind, path, dtype, weight_dtype)
        for (kind, dtype, weight_dtype), path in itertools.product(KINDS, get_args(Path))
        if path != "boxes" or (device.has_wgmma and kind != "ieee")
    ]


# tokens x features x depth, warps, most stages; the promising first
_Sizes = tuple[tuple[int, int, int, int, int], ...]
_PRODUCTS: dict[str, _Sizes] = {
    "half wgmma": (
        *((256, 128, 64, 8, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (32, 64, 64, 4, 4)),
        *((128, 128, 64, 4, 4), (64, 128, 64, 4, 4), (64, 128, 64, 8, 4), (64, 64, 128, 4, 4), (256, 64, 64, 4, 4)),
        *((16, 64, 128, 4, 4), (32, 64, 128, 4, 4), (128, 128, 32, 8, 4), (16, 64, 64, 4, 4)),
    ),
    "half mma": (
        *((128, 128, 32, 8, 4), (64, 64, 32, 4, 4), (128, 64, 32, 4, 4), (256, 128, 32, 8, 3), (32, 64, 64, 4, 4)),
        *((128, 128, 32, 4, 4), (64, 128, 32, 4, 4), (64, 64, 64, 4, 4), (128, 128, 64, 8, 3), (128, 64, 64, 8, 4)),
        *((16, 64, 64, 4, 4), (64, 32, 64, 4, 4), (32, 32, 64, 4, 4)),
    ),
    "tf32 wgmma": (
        *((128, 128, 32, 8, 4), (64, 64, 32, 4, 4), (256, 128, 32, 8, 3), (128, 64, 32, 4, 4), (32, 64, 32, 4, 4)),
        *((64, 128, 32, 4, 4), (128, 128, 32, 4, 4), (16, 64, 64, 4, 4)),
    ),
    "tf32 mma": (
        *((128, 128, 32, 8, 4), (64, 64, 32, 4, 3), (128, 64, 32, 4, 3), (32, 64, 32, 4, 4), (128, 128, 16, 8, 4)),
        *((64, 128, 32, 4, 3), (128, 64, 32, 8, 3), (16, 64, 32, 4, 4)),
    ),
    "ieee": (
        *((128, 64, 16, 8, 3), (64, 64, 16, 4, 3), (64, 64, 32, 8, 2), (32, 64, 16, 4, 3), (128, 128, 16, 8, 3)),
        *((64, 32, 32, 4, 3), (16, 64, 16, 4, 4)),
    ),
    "elements": (
        *((64, 64, 16, 8, 2), (64, 64, 32, 8, 2), (32, 64, 16, 4, 2), (64, 32, 32, 4, 2), (32, 32, 32, 4, 2)),
        *((16, 64, 16, 4, 2), (128, 64, 16, 8, 2)),
    ),
}

# W' on the right of wgmma, through shared memory: each step waits for its products, so two blocks should fit
_PRODUCTS |= {
    "half shared": (
        *((128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (32, 64, 64, 4, 4)),
        *((256, 128, 64, 8, 3), (128, 64, 64, 4, 4), (128, 128, 64, 8, 4), (64, 64, 128, 4, 4), (128, 256, 64, 8, 3)),
        *((16, 64, 128, 4, 4), (32, 64, 128, 4, 4), (64, 256, 64, 4, 3), (16, 64, 64, 4, 4)),
    ),
    "tf32 shared": (
        *((128, 128, 32, 8, 3), (64, 64, 32, 4, 4), (128, 128, 32, 4, 3), (128, 64, 32, 4, 4), (32, 64, 32, 4, 4)),
        *((64, 128, 32, 4, 4), (256, 128, 32, 8, 3), (16, 64, 64, 4, 4)),
    ),
}

# features x depth of the tile of G, with the tokens of a step first
_SCALES: dict[str, _Sizes] = {
    "half wgmma": (
        *((64, 128, 256, 8, 3), (64, 64, 64, 4, 4), (64, 128, 128, 8, 4), (64, 64, 64, 8, 4), (64, 64, 128, 8, 4)),
        *((64, 64, 128, 4, 4), (128, 128, 128, 8, 3), (64, 64, 256, 8, 3)),
    ),
    "half mma": (
        *((32, 128, 128, 8, 4), (32, 64, 64, 4, 4), (64, 128, 128, 8, 3), (32, 128, 64, 4, 4), (32, 64, 128, 8, 4)),
        *((64, 64, 64, 4, 3), (32, 128, 256, 8, 3)),
    ),
    "tf32": ((32, 128, 128, 8, 3), (32, 64, 64, 4, 3), (32, 128, 64, 8, 3), (16, 128, 128, 8, 4), (32, 64, 64, 8, 3)),
    # wgmma transposes no float32, so one side would come from registers; fewer than 64 features go by mma.sync
    "tf32 shared": (
        *((32, 32, 128, 4, 3), (32, 32, 64, 4, 4), (32, 32, 128, 8, 3), (16, 32, 128, 4, 4), (64, 32, 64, 4, 3)),
        *((32, 32, 256, 8, 3), (16, 32, 256, 8, 4)),
    ),
    "ieee": ((16, 128, 64, 8, 3), (16, 64, 64, 4, 3), (16, 128, 128, 8, 3), (32, 64, 64, 8, 2)),
    "elements": ((16, 64, 64, 8, 2), (32, 64, 64, 8, 2), (16, 64, 32, 4, 2), (16, 32, 64, 4, 2), (32, 64, 32, 4, 2)),
}

#: Left free beside the pipeline when stages are counted; what a tile really takes is read after compiling.
_SPARE_BYTES = 4 * 1024


def variants(kernel: Kernel, row: Row, device: Device) -> Iterator[Config]:
    """Tiles to try for a row, each with as many stages as fit."""
    untrusted = device.has_wgmma and not device.weight_left
    if row.path == "elements":
        key = "elements"
    elif row.kind == "ieee":
        key = "ieee"
    elif kernel == "grad_scales" and row.kind == "tf32":
        key = "tf32 shared" if untrusted else "tf32"
    elif kernel == "grad_scales" or not untrusted:
        key = f"{row.kind} {'wgmma' if device.has_wgmma else 'mma'}"
    else:
        key = f"{row.kind} shared"
    seen = set()
    for tokens, features, depth, warps, most in (_SCALES if kernel == "grad_scales" else _PRODUCTS)[key]:
        if kernel == "grad_scales":
            if untrusted and row.kind == "tf32" and features >= 64:
                continue
            m, n, k = tokens, features, depth
            stage = m * (n + k) * row.x_size
        elif kernel == "forward":
            m, n, k = tokens, features, depth
            stage = k * (m * row.x_size + n * row.weight_size)
        else:
            # a box of more rows than this would run into the next group
            m, n, k = tokens, min(depth, 64), features
            stage = n * (m * row.x_size + k * row.weight_size)
        stages = min(most, (device.shared_memory - _SPARE_BYTES) // stage)
        config = Config(m, n, k, warps, stages)
        if stages >= 2 and config not in seen:
            seen.add(config)
            yield config


def shapes(path: Path, kernel: Kernel) -> list[dict[str, int]]:
    """Shapes to compile for: ViT-B's fused qkv, or multiples of nothing.

    Groups matter to grad_input only, which has code of its own for one.
    """
    if path == "elements":
        return [{"m": 197, "n": 771, "k": 769, "groups": 3}]
    groups = (1, 3) if kernel == "grad_input" else (3,)
    return [{"m": 6304, "n": 2304, "k": 768, "groups": g} for g in groups]
