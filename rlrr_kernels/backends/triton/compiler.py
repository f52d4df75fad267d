"""Whether the installed Triton leaves registers alone that a running product still reads.

On Hopper a ``wgmma`` takes its left operand from registers while the code after it goes on. Triton before 3.9 puts the
next step's operand into them too early, without a word (triton-lang/triton 9433, 9514, 9530, 11781;
docs/performance-notes.md counts the tiles). ``make gates`` reads the machine code of every tile, for every supported
Triton; what it has found clean stands here. With any other, no ``wgmma`` has an operand in registers: W' goes through
shared memory, and grad_scales in TF32 by ``mma.sync``.
"""

from __future__ import annotations

from pathlib import Path

import triton
from triton import knobs

#: Compilers whose Hopper tiles all are clean.
CLEAN = frozenset({"3.9.0, ptxas 12.9"})


def name() -> str:
    """Triton and its ptxas, as ``3.9.0, ptxas 12.9``; with the place of one that ``TRITON_PTXAS_PATH`` names."""
    ptxas = knobs.nvidia.ptxas
    own = Path(ptxas.path).is_relative_to(Path(triton.__file__).parent)
    return f"{triton.__version__}, ptxas {ptxas.version}" + ("" if own else f" in {ptxas.path}")


def keeps_operands() -> bool:
    """Whether ``wgmma`` may have an operand in registers."""
    return name() in CLEAN
