"""What the three kernels share: forming the rescaled weight and guarding edges.

The letters are the same everywhere: M tokens, N output features, K input
features; a tile is ``BLOCK_M`` x ``BLOCK_N`` x ``BLOCK_K``. Rows of W form
``groups`` equal blocks of ``group_rows`` rows with a ``v`` each, and no tile
crosses a block, so a tile always meets one ``v``.
"""

import triton
import triton.language as tl


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


@triton.jit
def load_float(ptrs, mask):
    """Load as float32, with zeros outside of ``mask``; None: all is inside."""
    if mask is None:
        return tl.load(ptrs).to(tl.float32)
    else:
        return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def as_row(values):
    """``[C]`` or ``[1, C]`` -> ``[1, C]``."""
    if len(values.shape) == 1:
        return values[None, :]
    else:
        return values


@triton.jit
def load_u(u, offs_n, mask, RANK: tl.constexpr):
    """The columns ``[R]`` of rows of U. ``mask``: rows that exist, or None for all."""
    found = ()
    for j in tl.static_range(RANK):
        found += (load_float(u + offs_n * RANK + j, mask),)
    return found


@triton.jit
def load_v(ptrs, mask, K, RANK: tl.constexpr):
    """The rows of columns of a group's V.

    Args:
        ptrs: To the columns of the first row, ``[C]`` or ``[1, C]``.
        mask: Columns that exist, of the same shape, or None for all.
        K: Elements from one row of V to the next.
    """
    found = ()
    for j in tl.static_range(RANK):
        found += (load_float(ptrs + j * K, mask),)
    return found


@triton.jit
def rescale(
    w,
    u,
    v,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    PAIRED_BF16: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
):
    """W * (1 + U V) in float32, rounded once to the compute dtype (numerics contract).

    ``u``, ``v``: as :func:`load_u` and :func:`load_v` return them.
    """
    wide = widen(w, PAIRED_BF16)
    if RANK == 1:
        wide = wide * (1.0 + u[0][:, None] * as_row(v[0]))
    else:
        product = u[0][:, None] * as_row(v[0])
        for j in tl.static_range(1, RANK):
            product += u[j][:, None] * as_row(v[j])
        wide += wide * product  # one fused multiply-add, where 1 + U V would be an addition more
    rescaled = narrow(wide, DTYPE, EMULATE_BF16)
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
