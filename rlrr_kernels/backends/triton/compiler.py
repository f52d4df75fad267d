"""Whether the installed Triton leaves registers alone that a running product still reads.

On Hopper a ``wgmma`` takes its left operand from registers while the code after it goes on. Triton before 3.9 puts the
next step's operand into them too early, without a word (triton-lang/triton 9433, 9514, 9530, 11781;
docs/performance-notes.md counts the tiles). ``make gates`` reads the machine code of every tile, for every supported
Triton; what it has found clean stands here. With any other, no ``wgmma`` has an operand in registers: W' goes through
shared memory, and grad_scales in TF32 by ``mma.sync``.
"""

from __future__ import annotations

import triton
from triton import knobs

#: Compilers whose Hopper tiles all are clean.
CLEAN = frozenset({"3.9.0, ptxas 12.9"})


def name() -> str:
    """Triton and its ptxas, as ``3.9.0, ptxas 12.9``; ``TRITON_PTXAS_PATH`` may name another ptxas."""
    return f"{triton.__version__}, ptxas {knobs.nvidia.ptxas.version}"


def keeps_operands() -> bool:
    """Whether ``wgmma`` may have an operand in registers."""
    return name() in CLEAN
