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


@triton.constexpr_function
def padded(rank):
    """The depth of the product of U and V: a power of two that ``tl.dot`` takes."""
    return max(16, triton.next_power_of_2(rank))


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
def load_u(u, offs_n, mask, RANK: tl.constexpr, PARTS: tl.constexpr):
    """Rows of U as :func:`scale` takes them. ``mask``: rows that exist, or None for all."""
    found = ()
    if PARTS == 0:
        for j in tl.static_range(RANK):
            found += (load_float(u + offs_n * RANK + j, mask),)
    else:
        offs_j = tl.arange(0, padded(RANK))[None, :]
        in_n = None if mask is None else mask[:, None]
        if PARTS == 1:
            inside = offs_j < RANK if mask is None else in_n & (offs_j < RANK)
            found += (load_float(u + offs_n[:, None] * RANK + offs_j, inside),)
        else:
            for part in tl.static_range(PARTS):
                found += (load(u + (offs_n[:, None] * PARTS + part) * padded(RANK) + offs_j, in_n),)
    return found


@triton.jit
def load_v(v, offs_k, mask, K, RANK: tl.constexpr, PARTS: tl.constexpr):
    """Columns of a group's V as :func:`scale` takes them. ``mask``: columns that exist, or None for all."""
    found = ()
    if PARTS == 0:
        for j in tl.static_range(RANK):
            found += (load_float(v + j * K + offs_k, mask),)
    else:
        offs_j = tl.arange(0, padded(RANK))[:, None]
        in_k = None if mask is None else mask[None, :]
        if PARTS == 1:
            inside = offs_j < RANK if mask is None else in_k & (offs_j < RANK)
            found += (load_float(v + offs_j * K + offs_k[None, :], inside),)
        else:
            for part in tl.static_range(PARTS):
                found += (load(v + (part * padded(RANK) + offs_j) * K + offs_k[None, :], in_k),)
    return found


@triton.jit
def scale(u, v, RANK: tl.constexpr, PARTS: tl.constexpr):
    """1 + U V in float32.

    Args:
        u, v: If ``PARTS`` is 0, the columns of U and the rows of V. Else tiles of U and V, padded with zeros: one of
            float32, or three of bfloat16 that add up to float32.
    """
    if PARTS == 0:
        total = 1.0 + u[0][:, None] * v[0][None, :]
        for j in tl.static_range(1, RANK):
            total += u[j][:, None] * v[j][None, :]
        return total
    elif PARTS == 1:
        return 1.0 + tl.dot(u[0], v[0], input_precision="ieee")
    else:
        # the smallest first; what is left out is below float32's rounding
        total = tl.dot(u[2], v[0])
        total = tl.dot(u[0], v[2], total)
        total = tl.dot(u[1], v[1], total)
        total = tl.dot(u[1], v[0], total)
        total = tl.dot(u[0], v[1], total)
        return 1.0 + tl.dot(u[0], v[0], total)


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
