"""Plain PyTorch that never forms all of W': it forms one panel at a time, and the device's BLAS multiplies by it.

Forward forms panels of rows of W', within a group, and grad_input panels of columns, so that each element of y and dx
comes from one product and no rounded parts are added. grad_scales forms panels of G = dy^T x in float32, and reduces
each at once. Nothing waits for the device, and the shapes alone decide the order of all sums.

Each product and each operation on a panel is in place or has an ``out``: nothing is allocated for a panel, and autocast
does not apply. Shapes are as in :mod:`rlrr_kernels.backends.reference`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from rlrr_kernels.backends.reference import accumulation_dtype, offset_of

#: Bytes that a pass allocates besides its results and what the BLAS allocates itself.
SCRATCH = 2 << 20
#: Bytes of x and dy that are widened at a time if the BLAS cannot return float32 for 16-bit operands: a part of the
#: scratch on a CPU; in addition to it on other devices, where a launch costs more than memory.
TOKENS, TOKENS_ELSEWHERE = 3 << 18, 16 << 20
#: Steps in which a CPU forms a panel, because its operations on several dtypes copy their operands.
STEPS = 8


def unsupported(x: Tensor, weight: Tensor, rank: int = 1) -> str | None:
    """Return None: this backend supports all tensors that the op's validation accepts."""
    return None


@torch.no_grad()
def forward(
    x: Tensor,
    weight: Tensor,
    scale_out: Tensor,
    scale_in: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    *,
    rescaled: type[Panels] | None = None,
) -> Tensor:
    """Return y ``[M, N]`` in x's dtype. ``rescaled``: what forms the panels; default: operations of PyTorch."""
    offset = offset_of(bias, shift, x.dtype)
    x, y = _readable(x), x.new_empty(x.shape[0], weight.shape[0])
    formed = (rescaled or Rescaled)(weight, scale_out, scale_in, x.dtype)
    groups, rows, k = formed.weight.shape
    size = _size(rows, formed.most(k), halve=groups == 1)
    formed.allocate(1, size, k)
    for group in range(groups):
        for within in _panels(rows, size):
            panel = formed.panel(slice(group, group + 1), within, slice(None)).mT
            at = slice(group * rows + within.start, group * rows + within.stop)
            if offset is None:
                torch.mm(x, panel, out=y[:, at])
            else:
                torch.addmm(offset[at], x, panel, out=y[:, at])
    return y


@torch.no_grad()
def grad_input(
    dy: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, *, rescaled: type[Panels] | None = None
) -> Tensor:
    """Return dx = dy W' ``[M, K]`` in dy's dtype. ``rescaled``: as in :func:`forward`."""
    dy, dx = _readable(dy), dy.new_empty(dy.shape[0], weight.shape[1])
    formed = (rescaled or Rescaled)(weight, scale_out, scale_in, dy.dtype)
    groups, rows, k = formed.weight.shape
    size = _size(k, formed.most(groups * rows), halve=True)
    formed.allocate(groups, rows, size)
    for columns in _panels(k, size):
        torch.mm(dy, formed.panel(slice(None), slice(None), columns), out=dx[:, columns])
    return dx


@torch.no_grad()
def grad_scales(
    dy: Tensor, x: Tensor, weight: Tensor, scale_out: Tensor, scale_in: Tensor, need_shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return du ``[N, r]``, dv ``[groups, r, K]`` and df ``[N]`` (``[0]`` without ``need_shift``), float32 or float64.

    With G = dy^T x and P = G * W:  du = P v^T,  dv = u^T P,  df = sum of dy over the tokens.
    """
    groups, rank, k = scale_in.shape
    rows, wide = weight.shape[0] // groups, accumulation_dtype(x.dtype)
    u, v = scale_out.to(wide), scale_in.to(wide)
    du, dv = u.new_zeros(u.shape), v.new_zeros(v.shape)
    by_product = rank > 1 and _is_exact(x.device, wide)
    df = grad_shift(dy) if need_shift else du.new_empty(0)  # before the scratch is allocated, because it needs as much
    product = _Product(dy, x)
    copies = _copies(x.device, wide, weight.dtype)
    most = int(product.left / (wide.itemsize + copies / STEPS))
    if rows < k:  # cut the longer side: the BLAS reads the other side's operand again for each panel
        height, width = rows, _size(k, most // rows, halve=groups == 1)
    else:
        height, width = _size(rows, most // k, halve=groups == 1), k
    product.allocate(height, width)
    step = -(-height // STEPS) if copies else height
    for group, within, columns in itertools.product(range(groups), _panels(rows, height), _panels(k, width)):
        at = slice(group * rows + within.start, group * rows + within.stop)
        part = product.panel(at, columns)
        for some, w in zip(part.split(step), weight[at, columns].split(step), strict=True):
            some.mul_(w)
        if by_product:
            du[at].addmm_(part, v[group, :, columns].mT)
            dv[group, :, columns].addmm_(u[at].mT, part)
            continue
        for r in range(rank):
            du[at, r].addmv_(part, v[group, r, columns])
            dv[group, r, columns].addmv_(part.mT, u[at, r])
    return du, dv, df


def grad_shift(dy: Tensor) -> Tensor:
    """Return df ``[N]``, the sum of dy ``[M, N]`` over the tokens, in float32 or float64. For when only f trains."""
    wide = accumulation_dtype(dy.dtype)
    if not _copies(dy.device, dy.dtype, wide):
        return dy.sum(0, dtype=wide)
    # a CPU would widen all of dy before it sums
    size = max(SCRATCH // wide.itemsize // dy.shape[0], 1)
    return torch.cat([part.sum(0, dtype=wide) for part in dy.split(size, 1)])


class Panels(Protocol):
    """What forms panels of W' ``[N, K]``: :class:`Rescaled`, or another backend's kernel.

    Attributes:
        weight: W as ``[groups, N / groups, K]``.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, scale_out: Tensor, scale_in: Tensor, dtype: torch.dtype) -> None: ...

    def most(self, across: int) -> int:
        """Return how many rows (or columns) of ``across`` elements a panel may have."""

    def allocate(self, groups: int, rows: int, columns: int) -> None:
        """Allocate the scratch for panels of at most this size."""

    def panel(self, groups: slice, rows: slice, columns: slice) -> Tensor:
        """Form these rows of these groups (all rows of several) as one matrix, which the next panel overwrites."""


class Rescaled(Panels):
    """Forms panels by operations of PyTorch."""

    def __init__(self, weight: Tensor, scale_out: Tensor, scale_in: Tensor, dtype: torch.dtype) -> None:
        groups, self.dtype, self.wide = scale_in.shape[0], dtype, accumulation_dtype(dtype)
        # views, whatever the strides: [G, N / G, K], [G, N / G, r] and [G, r, K]
        self.weight = weight.unflatten(0, (groups, -1))
        self.u = scale_out.to(self.wide).unflatten(0, (groups, -1))
        self.v = scale_in.to(self.wide)
        self.one = self.v.new_ones(())
        self.rank = scale_in.shape[1]
        self.by_product = self.rank > 1 and _is_exact(weight.device, self.wide)
        self.copies = _copies(weight.device, self.wide, weight.dtype, dtype)

    def _step(self, rows: int) -> int:
        return -(-rows // STEPS) if self.copies else rows

    def most(self, across: int) -> int:
        rows = self.weight.shape[1]
        formed = self.copies + (0 if self.dtype is self.wide else self.wide.itemsize)
        return int(SCRATCH / across / (self.dtype.itemsize + formed * self._step(rows) / rows))

    def allocate(self, groups: int, rows: int, columns: int) -> None:
        new = self.weight.new_empty
        self.scratch = new(groups * rows * columns, dtype=self.dtype)
        if self.dtype is not self.wide:
            self.scales = new(groups * self._step(rows) * columns, dtype=self.wide)

    def panel(self, groups: slice, rows: slice, columns: slice) -> Tensor:
        weight, u, v = self.weight[groups, rows, columns], self.u[groups, rows], self.v[groups, :, columns]
        panel = _as(self.scratch, *weight.shape)
        step = self._step(weight.shape[1])
        for part, w, some in zip(panel.split(step, 1), weight.split(step, 1), u.split(step, 1), strict=True):
            scale = part if self.dtype is self.wide else _as(self.scales, *part.shape)
            if self.rank == 1:
                torch.addcmul(self.one, some, v, out=scale)
            elif self.by_product:
                torch.baddbmm(self.one, some, v, out=scale)
            else:
                torch.mul(some[..., :1], v[:, :1], out=scale)
                for r in range(1, self.rank):
                    scale.addcmul_(some[..., r, None], v[:, r, None])
                scale.add_(self.one)
            torch.mul(scale, w, out=part)
        return panel.flatten(0, 1)


class _Product:
    """Forms panels of G = dy^T x ``[N, K]`` in float32 or float64.

    Attributes:
        left: Bytes of scratch that remain for a panel.
    """

    def __init__(self, dy: Tensor, x: Tensor) -> None:
        self.wide, self.narrow = accumulation_dtype(x.dtype), x.dtype is not accumulation_dtype(x.dtype)
        on_cpu = x.device.type == "cpu"
        self.widens = self.narrow and not _gives_float32(x.device)
        self.dy, self.x = (dy, x) if self.widens else (_readable(dy), _readable(x))
        self.tokens = TOKENS if on_cpu else TOKENS_ELSEWHERE
        self.left = SCRATCH - (TOKENS if self.widens and on_cpu else 0)

    def allocate(self, rows: int, columns: int) -> None:
        """Allocate the scratch for panels of at most this size."""
        new = functools.partial(self.x.new_empty, dtype=self.wide)
        self.gradient = new(rows * columns)
        if self.widens:
            self.chunk = min(max(self.tokens // self.wide.itemsize // (rows + columns), 1), self.x.shape[0])
            self.wide_dy, self.wide_x = new(self.chunk * rows), new(self.chunk * columns)

    def panel(self, rows: slice, columns: slice) -> Tensor:
        """Form this part of G, which the next panel overwrites."""
        dy, x = self.dy[:, rows], self.x[:, columns]
        gradient = _as(self.gradient, dy.shape[1], x.shape[1])
        if self.widens:
            for i, (some_dy, some_x) in enumerate(zip(dy.split(self.chunk), x.split(self.chunk), strict=True)):
                wide_dy = _as(self.wide_dy, *some_dy.shape).copy_(some_dy)
                wide_x = _as(self.wide_x, *some_x.shape).copy_(some_x)
                gradient.addmm_(wide_dy.mT, wide_x, beta=min(i, 1))
        elif self.narrow:
            torch.mm(dy.mT, x, out_dtype=self.wide, out=gradient)
        else:
            torch.mm(dy.mT, x, out=gradient)
        return gradient


def _as(scratch: Tensor, *shape: int) -> Tensor:
    """Return the beginning of a scratch as a tensor of this shape."""
    return scratch[: math.prod(shape)].view(shape)


def _gives_float32(device: torch.device) -> bool:
    """Return whether the BLAS can return float32 for 16-bit operands. Through PyTorch only NVIDIA's can."""
    return device.type == "cuda" and torch.version.hip is None


def _is_exact(device: torch.device, wide: torch.dtype) -> bool:
    """Return whether PyTorch's settings leave a product's float32 or float64 operands as they are."""
    if wide is torch.float64:
        return True
    settings = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return settings.matmul.fp32_precision not in ("tf32", "bf16")


def _readable(t: Tensor) -> Tensor:
    """Return a matrix that a BLAS can read, copied if it must be: once, instead of once for each panel."""
    (rows, columns), (a, b) = t.shape, t.stride()
    return t if (b == 1 and a >= columns) or (a == 1 and b >= rows) else t.contiguous()


def _copies(device: torch.device, *dtypes: torch.dtype) -> int:
    """Return the bytes that an operation on these dtypes copies for each element. Only CPUs copy to convert."""
    if device.type != "cpu":
        return 0
    common = functools.reduce(torch.promote_types, dtypes)
    return sum(common.itemsize for dtype in dtypes if dtype is not common)


def _size(count: int, most: int, halve: bool) -> int:
    """Return how many of ``count`` rows (or columns) a panel has: at most ``most``, and with ``halve`` never all."""
    number = max(-(-count // max(most, 1)), 2 if halve else 1)
    size = -(-count // number)
    for tile in (128, 16):  # sizes of a BLAS's tiles
        if most >= tile:
            size = min(-(-size // tile), most // tile) * tile
            break
    return min(size, -(-count // 2) if halve else count)


def _panels(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
