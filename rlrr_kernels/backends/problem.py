"""``Problem``: one pass of one layer, by which backends, tiles and measurements are chosen."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

#: The three passes of the rescaled linear layer, by the names of the backends' functions.
Pass = Literal["forward", "grad_input", "grad_scales"]

#: The largest rank of u v.
MAX_RANK = 128


def uses_tf32(dtype: torch.dtype) -> bool:
    """Return whether PyTorch's settings let products of this dtype round their operands to TF32 on a GPU."""
    # not allow_tf32: reading it raises once the user has set fp32_precision; read for float32 only, because it is slow
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


class Problem(NamedTuple):
    """A pass with x ``[m, k]``, W ``[n, k]`` and dy ``[m, n]``.

    Attributes:
        kernel: Which pass.
        m: Number of tokens.
        n: Number of output features.
        k: Number of input features.
        groups: Number of blocks of W's rows that have a v each.
        dtype: Dtype of x and dy.
        weight_dtype: Dtype of W.
        tf32: Whether float32 products may round their operands to TF32.
        rank: Rank of u v.
    """

    kernel: Pass
    m: int
    n: int
    k: int
    groups: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    tf32: bool = False
    rank: int = 1
