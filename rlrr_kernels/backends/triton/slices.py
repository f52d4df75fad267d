"""Slices of W's rows for ``grad_scales``: its partial sums stay within a fixed workspace for any N x K."""

from __future__ import annotations

from functools import lru_cache

from rlrr_kernels.backends.triton.config import Config
from rlrr_kernels.backends.triton.start import ceil_div

Slice = tuple[int, int, int]


@lru_cache(maxsize=1024)
def row_slices(n: int, k: int, groups: int, config: Config, splits: int, limit: int) -> tuple[Slice, ...]:
    """(group, first row, end) of each slice of W ``[n, k]``, in order, as few as ``limit`` bytes of partial sums allow.

    One slice of all rows, ``((0, 0, n),)``, where they fit. A slice is a multiple of a tile and
    never crosses a group; one tile is the least, whatever it takes.
    """
    group_rows = n // groups
    # of one row of tiles: du and df for each of its rows, dv for each column
    tile_bytes = 4 * splits * (config.block_n * (ceil_div(k, config.block_k) + 1) + k)
    if groups * ceil_div(group_rows, config.block_n) * tile_bytes <= limit:
        return ((0, 0, n),)
    rows = max(1, limit // tile_bytes) * config.block_n
    return tuple(
        (group, group * group_rows + first, group * group_rows + min(first + rows, group_rows))
        for group in range(groups)
        for first in range(0, group_rows, rows)
    )
