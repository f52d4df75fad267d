"""The three passes in plain PyTorch, a panel of W' at a time: for devices that have no kernels of their own here.

W' is never whole. A panel of it is formed in a scratch of at most :data:`SCRATCH_BYTES`, multiplied by ``torch.mm`` and
overwritten by the next: some rows of W' in forward, some columns in grad_input, some rows of G = dy^T x in
grad_scales, which are reduced at once. So each result comes from one product, and no rounded parts are added up.
Shapes and letters as in :mod:`rlrr_kernels.reference`. It serves every device and floating dtype, at any rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlrr_kernels.reference import accumulation_dtype, grad_shift, without_autocast

#: Most memory that a panel takes with what it is formed from; one row or column is the least.
SCRATCH_BYTES = 2**21


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """It serves everything that validation lets through."""
    return None


def forward(
    x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, bias: Tensor | None, shift: Tensor | None
) -> Tensor:
    """y ``[M, N]`` in x's dtype."""
    w, u, v, wide = _grouped(weight, scale_out, scale_in, x.dtype)
    offset = bias if shift is None else shift
    if bias is not None and shift is not None:
        offset = bias.to(wide) + shift.to(wide)  # their own dtypes may be narrower than x's
    x = _once(x)
    offset = None if offset is None else offset.to(x.dtype)
    y = x.new_empty((x.shape[0], weight.shape[0]))
    panel = _Panel(x, wide)
    with without_autocast(x):
        for groups, rows, span in _row_spans(w, panel.element_bytes):
            rescaled = panel.form(w[groups, rows], u[groups, rows], v[groups]).mT
            if offset is None:
                torch.mm(x, rescaled, out=y[:, span])
            else:
                torch.addmm(offset[span], x, rescaled, out=y[:, span])
    return y


def grad_input(dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor) -> Tensor:
    """dx = dy W' ``[M, K]`` in dy's dtype."""
    w, u, v, wide = _grouped(weight, scale_out, scale_in, dy.dtype)
    dy = _once(dy)
    (n, k) = weight.shape
    dx = dy.new_empty((dy.shape[0], k))
    panel = _Panel(dy, wide)
    with without_autocast(dy):
        for span in _spans(k, SCRATCH_BYTES // (n * panel.element_bytes), 2):
            torch.mm(dy, panel.form(w[:, :, span], u, v[:, :, span]), out=dx[:, span])
    return dx


def grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """du ``[N, r]``, dv ``[G, r, K]`` and df ``[N]`` (``[0]`` unless asked for) in float32 or float64."""
    w, u, v, wide = _grouped(weight, scale_out, scale_in, x.dtype)
    dy, x = _once(dy), _once(x)
    du = torch.empty(u.shape, dtype=wide, device=x.device)
    dv = torch.zeros(v.shape, dtype=wide, device=x.device)
    with without_autocast(x):
        # a third of the scratch for P = G * W, one for what G is formed from, one for P v and P u
        for groups, rows, span in _row_spans(w, 3 * wide.itemsize):
            part = w[groups, rows]
            p = _gram(dy[:, span], x, wide).view(part.shape).mul_(part)
            product = torch.empty_like(p)
            for r in range(u.shape[2]):
                # not by torch.mv, which adds up one after another: sum does so in pairs
                du[groups, rows, r] = torch.mul(p, v[groups, r, None], out=product).sum(2)
                dv[groups, r] += torch.mul(p, u[groups, rows, r, None], out=product).sum(1)
    return du.view(scale_out.shape), dv, grad_shift(dy) if need_shift else du.new_empty(0)


def _gram(dy: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """dy^T x ``[rows, K]``, summed and left in ``wide``."""
    if x.dtype is wide:
        return dy.mT @ x
    if x.is_cuda and torch.version.hip is None:
        return torch.mm(dy.mT, x, out_dtype=wide)
    # elsewhere products of 16-bit numbers come rounded to 16 bits: some tokens at a time are widened instead
    total = torch.zeros((dy.shape[1], x.shape[1]), dtype=wide, device=x.device)
    for tokens in _spans(len(x), SCRATCH_BYTES // (3 * wide.itemsize * (dy.shape[1] + x.shape[1]))):
        total.addmm_(dy[tokens].mT.to(wide), x[tokens].to(wide))
    return total


class _Panel:
    """Memory for one panel of W' at a time: for the type of its sums, and for the operands' where that is another."""

    def __init__(self, like: Tensor, wide: torch.dtype) -> None:
        self._wide = torch.empty(0, dtype=wide, device=like.device)
        self._narrow = self._wide if like.dtype is wide else like.new_empty(0)
        #: of one element of W'
        self.element_bytes = wide.itemsize + (0 if like.dtype is wide else like.dtype.itemsize)

    def form(self, w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """W (1 + u v) ``[g * rows, cols]`` of w ``[g, rows, cols]``; overwritten by the next call."""
        wide = self._wide
        if wide.shape != w.shape:
            wide = self._wide.resize_(w.shape)
        # products by the element, not a matmul: TF32 would round u and v to 10 bits
        torch.mul(u[:, :, :1], v[:, :1], out=wide)
        for r in range(1, u.shape[2]):
            wide.addcmul_(u[:, :, r : r + 1], v[:, r : r + 1])
        wide.add_(1).mul_(w)
        if self._narrow is self._wide:
            return wide.flatten(0, 1)
        return self._narrow.resize_(w.shape).copy_(wide).flatten(0, 1)


def _grouped(
    weight: Tensor, scale_out: Tensor, scale_in: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """W ``[G, N / G, K]``, u ``[G, N / G, r]`` and v ``[G, r, K]`` in the type of the sums, and that type."""
    wide, groups = accumulation_dtype(dtype), scale_in.shape[0]
    return weight.unflatten(0, (groups, -1)), scale_out.to(wide).unflatten(0, (groups, -1)), scale_in.to(wide), wide


def _once(t: Tensor) -> Tensor:
    """A matrix as ``torch.mm`` reads it without a copy, which it would make for each panel."""
    rows, cols = t.stride()
    plain = (cols == 1 and rows >= t.shape[1]) or (rows == 1 and cols >= t.shape[0])
    return t if plain else t.contiguous()


def _spans(length: int, most: int, least_parts: int = 1) -> Iterator[slice]:
    """``length`` in as few parts of at most ``most`` as can be, nearly equal; ``least_parts`` where it has so many."""
    parts = max(-(-length // max(1, most)), min(least_parts, length))
    step = -(-length // parts)
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def _row_spans(w: Tensor, element_bytes: int) -> Iterator[tuple[slice, slice, slice]]:
    """(groups, rows of each, rows of W) of the panels of W ``[G, N / G, K]``: of whole groups, or within one."""
    groups, rows, k = w.shape
    most = SCRATCH_BYTES // (k * element_bytes)
    if groups > 1 and rows <= most:
        for some in _spans(groups, most // rows, 2):
            yield some, slice(None), slice(some.start * rows, some.stop * rows)
        return
    for group in range(groups):
        for part in _spans(rows, most, 2):
            yield slice(group, group + 1), part, slice(group * rows + part.start, group * rows + part.stop)
