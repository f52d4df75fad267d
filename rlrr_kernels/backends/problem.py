"""One pass at one layer, as everything that chooses for it sees it: backends, tiles, the tuner."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

#: The three passes of the rescaled linear layer, by the names of the backends' functions.
Pass = Literal["forward", "grad_input", "grad_scales"]


class Problem(NamedTuple):
    """A pass with x ``[m, k]``, W ``[n, k]`` and dy ``[m, n]``.

    Attributes:
        kernel: which pass.
        m, n, k: tokens, output features, input features.
        groups: blocks of W's rows that have a v each.
        dtype: of x and dy.
        weight_dtype: of W.
        tf32: whether float32 products may round their operands to TF32.
    """

    kernel: Pass
    m: int
    n: int
    k: int
    groups: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    tf32: bool = False
