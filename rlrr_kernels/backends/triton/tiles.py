"""What the three kernels share: forming the rescaled weight and guarding edges.

The letters are the same everywhere: M tokens, N output features, K input
features; a tile is ``BLOCK_M`` x ``BLOCK_N`` x ``BLOCK_K``. Rows of W form
``groups`` equal blocks of ``group_rows`` rows with a ``v`` each, and no tile
crosses a block, so a tile always meets one ``v``.
"""

import triton
import triton.language as tl

from rlrr_kernels.backends.triton import choose


@triton.jit
def narrow(value, DTYPE: tl.constexpr, EMULATE_BF16: tl.constexpr):
    """float32 -> DTYPE, to the nearest.

    ``EMULATE_BF16``: Triton's interpreter cuts bfloat16 off instead of rounding
    it, so there the rounding is done on the bits first; a GPU never does.
    """
    if EMULATE_BF16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def operand(tile, EMULATE_BF16: tl.constexpr):
    """A tile as ``tl.dot`` takes it: the interpreter would multiply bfloat16's raw bits."""
    if EMULATE_BF16:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def round_to_tf32(tile):
    """float32 -> the nearest TF32 value: left alone, the tensor cores cut the last 13 bits off."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def widen(tile, PAIRED_BF16: tl.constexpr):
    """A tile as float32.

    ``PAIRED_BF16``: for bfloat16 on a GPU, two neighbours by one shift and one mask of the register
    that holds both; the compiler takes three instructions. ``&``: the first is written before the input
    is read for the second.
    """
    if PAIRED_BF16:
        tile = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=&r,=r,r",
            [tile],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return tile.to(tl.float32)


#: See :func:`choose.chunk` and :func:`choose.padded`.
chunk, padded = (triton.constexpr_function(each) for each in (choose.chunk, choose.padded))


@triton.jit
def load(ptrs, mask):
    """Load, with zeros outside of ``mask``; None: all is inside."""
    if mask is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def load_float(ptrs, mask):
    """Load as float32, with zeros outside of ``mask``; None: all is inside."""
    return load(ptrs, mask).to(tl.float32)


@triton.jit
def as_row(values):
    """``[C]`` or ``[1, C]`` -> ``[1, C]``."""
    if len(values.shape) == 1:
        return values[None, :]
    else:
        return values


@triton.constexpr_function
def u_stride(rank, parts):
    """Elements from one row of U to the next."""
    return rank if parts < 2 else parts * padded(rank, parts)


@triton.jit
def load_u(u, offs_n, mask, RANK: tl.constexpr, PARTS: tl.constexpr):
    """Rows of U as :func:`scale` takes them. ``mask``: rows that exist, or None for all."""
    found = ()
    if PARTS == 0:
        for j in tl.static_range(RANK):
            found += (load_float(u + offs_n * RANK + j, mask),)
    else:
        in_n = None if mask is None else mask[:, None]
        rows = u + offs_n[:, None] * u_stride(RANK, PARTS)
        for first in tl.static_range(0, padded(RANK, PARTS), chunk(RANK, PARTS)):
            offs_j = first + tl.arange(0, chunk(RANK, PARTS))[None, :]
            if PARTS == 1:
                found += (load_float(rows + offs_j, offs_j < RANK if mask is None else in_n & (offs_j < RANK)),)
            else:
                for part in tl.static_range(PARTS):
                    found += (load(rows + part * padded(RANK, PARTS) + offs_j, in_n),)
    return found


@triton.jit
def row_stride(K, stride_vg, RANK: tl.constexpr, PARTS: tl.constexpr):
    """Elements from one row of V to the next. Rows of bfloat16 parts are padded, so that vectors can be loaded."""
    if PARTS > 1:
        return tl.multiple_of(stride_vg // (PARTS * padded(RANK, PARTS)), 16)
    else:
        return K


@triton.jit
def load_v(ptrs, mask, stride, RANK: tl.constexpr, PARTS: tl.constexpr):
    """Columns of a group's V as :func:`scale` takes them.

    Args:
        ptrs: To the columns of the first row, ``[C]`` or ``[1, C]``.
        mask: Columns that exist, of the same shape, or None for all. If ``PARTS`` > 1, those up to ``stride``.
        stride: :func:`row_stride`.
    """
    found = ()
    if PARTS == 0:
        for j in tl.static_range(RANK):
            found += (load_float(ptrs + j * stride, mask),)
    else:
        for first in tl.static_range(0, padded(RANK, PARTS), chunk(RANK, PARTS)):
            offs_j = first + tl.arange(0, chunk(RANK, PARTS))[:, None]
            if PARTS == 1:
                inside = offs_j < RANK if mask is None else as_row(mask) & (offs_j < RANK)
                found += (load_float(as_row(ptrs) + offs_j * stride, inside),)
            else:
                inside = None if mask is None else as_row(mask)
                for part in tl.static_range(PARTS):
                    rows = part * padded(RANK, PARTS) + offs_j
                    found += (load(as_row(ptrs) + rows * stride, inside),)
    return found


@triton.jit
def scale(u, v, RANK: tl.constexpr, PARTS: tl.constexpr):
    """1 + U V in float32.

    Args:
        u, v: If ``PARTS`` is 0, the columns ``[BLOCK_N, 1]`` of U and the rows ``[1, BLOCK_K]`` of V. Else tiles of U
            and V for one chunk of the rank after another, padded with zeros: of float32 each, or three of bfloat16 that
            add up to float32.
    """
    if PARTS == 0:
        total = 1.0 + u[0] * v[0]
        for j in tl.static_range(1, RANK):
            total += u[j] * v[j]
        return total
    else:
        total = tl.zeros((u[0].shape[0], v[0].shape[1]), tl.float32)
        for i in tl.static_range(0, padded(RANK, PARTS) // chunk(RANK, PARTS) * PARTS, PARTS):
            if PARTS == 1:
                total = tl.dot(u[i], v[i], total, input_precision="ieee")
            else:
                # the smallest products first; those left out are below float32's rounding
                total = tl.dot(u[i + 2], v[i], total)
                total = tl.dot(u[i], v[i + 2], total)
                total = tl.dot(u[i + 1], v[i + 1], total)
                total = tl.dot(u[i + 1], v[i], total)
                total = tl.dot(u[i], v[i + 1], total)
                total = tl.dot(u[i], v[i], total)
        return 1.0 + total


@triton.jit
def rescale(
    w,
    u,
    v,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRED_BF16: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """W * (1 + U V) in float32, rounded once to the compute dtype (numerics contract)."""
    if PARTS == 0:
        columns, rows = (), ()
        for j in tl.static_range(RANK):
            columns += (u[j][:, None],)
            rows += (as_row(v[j]),)
        u, v = columns, rows
    rescaled = narrow(widen(w, PAIRED_BF16) * scale(u, v, RANK, PARTS), DTYPE, EMULATE_BF16)
    if ROUND_TF32:
        rescaled = round_to_tf32(rescaled)
    return operand(rescaled, EMULATE_BF16)


@triton.jit
def int64(value):
    """A scalar as int64: M * K passes 2**31 in real training. Takes the interpreter's plain ints too."""
    return tl.full((), 0, tl.int64) + value


@triton.jit
def group_tile(pid, group_rows, BLOCK_N: tl.constexpr):
    """Program -> (group, first row of the tile in W, one past the group's last row)."""
    tiles = tl.cdiv(group_rows, BLOCK_N)
    group = pid // tiles
    start = group * group_rows + (pid % tiles) * BLOCK_N
    return group, start, (group + 1) * group_rows
