"""Slices of W's rows for ``grad_scales``: its partial sums stay within a fixed workspace for any N x K."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from rlrr_kernels.backends.triton.start import ceil_div

Slice = tuple[int, int, int]


@lru_cache(maxsize=1024)
def row_slices(n: int, k: int, groups: int, block_n: int, block_k: int, splits: int, limit: int) -> tuple[Slice, ...]:
    """(group, first row, end) of each slice of W ``[n, k]``, in order, as few as ``limit`` bytes of partial sums allow.

    One slice of all rows, ``((0, 0, n),)``, where they fit. A slice is a multiple of a tile and
    never crosses a group; one tile is the least, whatever it takes.
    """
    group_rows = n // groups
    # of one row of tiles: du and df for each of its rows, dv for each column
    tile_bytes = 4 * splits * (block_n * (ceil_div(k, block_k) + 1) + k)
    if groups * ceil_div(group_rows, block_n) * tile_bytes <= limit:
        return ((0, 0, n),)
    rows = max(1, limit // tile_bytes) * block_n
    return tuple(
        (group, group * group_rows + first, group * group_rows + min(first + rows, group_rows))
        for group in range(groups)
        for first in range(0, group_rows, rows)
    )


def in_slices(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    slices: tuple[Slice, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """``run(dy, x, weight, scale_out, scale_in)`` over one slice after another: dv adds up in that order."""
    dv = torch.zeros(scale_in.shape, dtype=torch.float32, device=x.device)
    du_parts, df_parts = [], []
    for group, first, end in slices:
        rows = slice(first, end)
        du, dv_part, df = run(dy[:, rows], x, weight[rows], scale_out[rows], scale_in[group : group + 1])
        dv[group] += dv_part[0]
        du_parts.append(du)
        df_parts.append(df)
    return torch.cat(du_parts), dv, torch.cat(df_parts)
