"""What a loop of machine code asks of a multiprocessor: counted from its disassembly.

Pipes and widths are those of NVIDIA's throughput table ("Arithmetic Instructions" in the CUDA
programming guide): a scheduler starts one instruction a cycle; integer, logic, comparison
and conversion units are 16 lanes wide, so a warp holds them for two cycles; multiply-add
units are 32 lanes wide, on sm_80 16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Multiply-adds of float32 units; packed forms (sm_100) are two in one instruction.
_FLOAT = ("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2")
#: Integer multiply-adds run on half of the multiply-add lanes.
_INTEGER_FMA = ("IMAD",)
#: The 16-lane units.
_ALU = (
    *("PRMT", "LOP3", "SHF", "IADD", "VIADD", "LEA", "SEL", "ISETP", "FSETP", "PLOP3", "F2FP", "MOV", "IABS"),
    *("FMNMX", "FSEL", "IMNMX", "VIMNMX", "BMSK", "SGXT", "P2R", "R2P", "CS2R"),
)
_WAITS = ("BAR.", "DEPBAR", "WARPGROUP.DEPBAR", "SYNCS.PHASECHK")

#: Steps that the compiler may have unrolled into one pass are told by the products in it.
_HMMA = re.compile(r"HMMA\.(16)(8)(\d+)\b")
_HGMMA = re.compile(r"[HI]GMMA\.64x(\d+)x(\d+)\.\S* \S+ (R\d+|gdesc)")


@dataclass(frozen=True)
class Mix:
    """One warp, one step. ``slots``: cycles of its scheduler; ``shared_bytes``: moved by its loads, stores and
    products; ``waits``: barriers and waits; ``tensor``: tensor-core instructions; ``through_shared``: wgmmas that
    read W' (or dy) from shared memory instead of registers."""

    instructions: int
    slots: int
    shared_bytes: int
    waits: int
    tensor: int
    through_shared: int


def unpredicated(instruction: str) -> str:
    """The instruction without its predicate."""
    return re.sub(r"^@!?U?P\w+ ", "", instruction)


def _shared_bytes(instruction: str) -> int:
    """Bytes that a warp's instruction moves between shared memory and registers; loads of nothing are fences."""
    if " RZ, [RZ" in instruction:
        return 0
    if match := re.match(r"(?:LDSM|STSM)\.\S*?88(?:\.(\d))?\b", instruction):
        return 128 * int(match[1] or 1)
    if match := re.match(r"(?:LDS|STS)\b(\S*)", instruction):
        width = re.search(r"\.(?:U|S)?(8|16|64|128)\b", match[1])
        return 32 * (int(width[1]) // 8 if width else 4)
    return 0


def _wgmma_bytes(instruction: str, element: int) -> tuple[int, bool]:
    """Bytes of shared memory a wgmma reads for one of its four warps, and whether its left operand is among them."""
    match = _HGMMA.search(instruction)
    if not match:
        return 0, False
    columns, depth, left = int(match[1]), int(match[2]), match[3]
    rows = 64 if left == "gdesc" else 0
    return (columns + rows) * depth * element // 4, bool(rows)


def _products(names: Sequence[str]) -> float:
    """Multiply-adds of one warp by its tensor cores; 0 where they cannot be told (tcgen05) or are none."""
    total = 0.0
    for name in names:
        if match := _HMMA.match(name):
            total += int(match[1]) * int(match[2]) * int(match[3])
        elif match := _HGMMA.search(name):
            total += 64 * int(match[1]) * int(match[2]) / 4
    return total


def mix(loop: Sequence[str], architecture: str, element: int, step_fma: int, warps: int) -> Mix:
    """Count a loop; ``element``: bytes of an operand, ``step_fma``: multiply-adds of one step of the whole block."""
    names = [unpredicated(i) for i in loop if not unpredicated(i).startswith("NOP")]
    products = _products(names)
    steps = max(1, round(products * warps / step_fma)) if products else 1

    def count(prefixes: tuple[str, ...]) -> int:
        # a packed form is two
        return sum(2 if re.match(r"\w+2\b", n) and n[0] == "F" else 1 for n in names if n.startswith(prefixes))

    floats, integers = count(_FLOAT), count(_INTEGER_FMA)
    narrow = 2 if architecture == "sm_80" else 1
    slots = max(len(names), 2 * count(_ALU), narrow * (floats + integers), 2 * integers)
    wgmmas = [_wgmma_bytes(name, element) for name in names]
    shared = sum(_shared_bytes(name) for name in names) + sum(size for size, _ in wgmmas)
    tensor = sum(bool(re.match(r"\w*MMA\b", name)) for name in names)
    waits = sum(name.startswith(_WAITS) for name in names)

    def share(total: int) -> int:
        return -(-total // steps)

    return Mix(
        share(len(names)),
        share(slots),
        share(shared),
        share(waits),
        share(tensor),
        sum(through for _, through in wgmmas),
    )
