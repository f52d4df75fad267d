"""Whether the installed Triton leaves registers alone that a running product still reads.

On Hopper a ``wgmma`` takes its left operand from registers while the code after it goes on. Triton before 3.9 lets
ptxas put the next step's W' into them too early, without a word: 36 of 40 tiles with 3.6.0 and with 3.8.0
(triton-lang/triton 9433, 9514, 9530, 11781). ``make gates`` reads the machine code of every tile, for every supported
Triton; what it has found clean stands here. With any other, W' goes through shared memory, where nothing of the kind
can happen.
"""

from __future__ import annotations

import triton
from triton import knobs

#: Triton, and the ptxas that it brings, whose Hopper tiles all are clean with W' in registers.
CLEAN = frozenset({("3.9.0", "12.9")})


def keeps_operands() -> bool:
    """Whether W' may be the register operand of ``wgmma``. With another ptxas (``TRITON_PTXAS_PATH``) it may not."""
    return (triton.__version__, knobs.nvidia.ptxas.version) in CLEAN
