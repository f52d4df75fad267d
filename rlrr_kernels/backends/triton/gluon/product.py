"""y = x W'^T + b + f and dx = dy W' on Hopper, by one kernel, with W' = W * (1 + u v) formed in registers.

Both are out = act W'^T over a depth: rows of W' are features of the result (N in forward, K in grad_input, whose W is
read transposed), the depth is what is summed over (K, or N). A block stays for many tiles of ``[WIDE + EXTRA tokens,
128 rows]``. One warp fetches boxes; two warpgroups hold 64 rows of W' each: they form those of the next step while
the product of this one runs, so a product never waits for W' and W' never leaves the registers. A tile's result goes
to shared memory and from there out by the copy engine, while the next tile's loop runs.

A box ``[rows, cols]`` that reaches outside of a matrix brings zeros there, and is cut where it is stored.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rlrr_kernels.backends.triton.gluon.names import (
    fence_async_shared,
    load_box,
    mbarrier,
    store_box,
    wait_for_stores,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.jit
def widen(tile, PAIRED_BF16: gl.constexpr):
    """A tile as float32; two neighbours in bfloat16 by one shift and one mask of the register that holds both."""
    if PAIRED_BF16:
        tile = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=&r,=r,r",
            [tile],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )
    return tile.to(gl.float32)


@gluon.jit
def tile_origin(tile, M_TILE: gl.constexpr, row_tiles):
    """Tile -> its first token, and its number among those of the same tokens, which run together."""
    return (tile // row_tiles) * M_TILE, tile % row_tiles


@gluon.jit
def following(stage, phase, STAGES: gl.constexpr):
    """The stage of the next step, and the phase of its barriers: the other one after each round."""
    wraps = stage == STAGES - 1
    return 0 if wraps else stage + 1, phase ^ 1 if wraps else phase


@gluon.jit
def form(
    part: gl.constexpr, stage, phase, row_scale, w_smem, s_smem, full, A: gl.constexpr,
    FORWARD: gl.constexpr, PAIRED_BF16: gl.constexpr,
):  # fmt: skip
    """A warpgroup's 64 rows of W' ``[64, DEPTH]`` of a stage, once its boxes are there: in float32, rounded once."""
    mbarrier.wait(full.index(stage), phase)
    if FORWARD:
        w = w_smem.index(stage).slice(part * 64, 64).load(A)
    else:
        w = w_smem.index(stage).slice(part * 64, 64, dim=1).permute((1, 0)).load(A)
    depth_scale = s_smem.index(stage).load(A)
    return (widen(w, PAIRED_BF16) * (1.0 + row_scale * depth_scale)).to(w_smem.dtype)


@gluon.jit
def vector(pointer, start, end, layout: gl.constexpr):
    """64 values from ``start`` on as float32, zeros from ``end`` on."""
    at = start + gl.arange(0, 64, layout)
    return gl.load(pointer + at, mask=at < end, other=0.0).to(gl.float32)


@gluon.jit
def consumer(
    part: gl.constexpr, row_scales, bias, shift, out_wide, out_extra, wide_smem, extra_smem, w_smem, s_smem,
    y_smem, y_extra_smem, full, empty, M, ROWS, steps, group_steps,
    FORWARD: gl.constexpr, ONE_GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_SHIFT: gl.constexpr,
    PAIRED_BF16: gl.constexpr, WIDE: gl.constexpr, EXTRA: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 16])
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    ACC_EXTRA: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    A_EXTRA: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC_EXTRA, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, A)
    OUT: gl.constexpr = gl.SliceLayout(1, ACC)
    row_tiles = gl.cdiv(ROWS, 128)
    tiles = gl.cdiv(M, WIDE + EXTRA) * row_tiles
    stage, phase = 0, 0
    # of the tile to come, so that no tile begins by waiting for it
    next_scale = vector(row_scales, (gl.program_id(0) % row_tiles) * 128 + part * 64, ROWS, ROW)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, number = tile_origin(tile, WIDE + EXTRA, row_tiles)
        row = number * 128 + part * 64
        row_scale = gl.expand_dims(next_scale, 1)
        next_scale = vector(row_scales, ((tile + gl.num_programs(0)) % row_tiles) * 128 + part * 64, ROWS, ROW)
        if HAS_BIAS:
            offset = vector(bias, row, ROWS, OUT)
            if HAS_SHIFT:
                offset += vector(shift, row, ROWS, OUT)
        elif HAS_SHIFT:
            offset = vector(shift, row, ROWS, OUT)

        acc = warpgroup_mma_init(gl.zeros([64, WIDE], gl.float32, ACC))
        if EXTRA > 0:
            acc_extra = warpgroup_mma_init(gl.zeros([64, EXTRA], gl.float32, ACC_EXTRA))
        w = form(part, stage, phase, row_scale, w_smem, s_smem, full, A, FORWARD, PAIRED_BF16)
        # the depth of grad_input walks the groups, which have a v each for these rows
        group_scales, left = row_scales, group_steps
        for _ in range(1, steps):
            acc = warpgroup_mma(w, wide_smem.index(stage).permute((1, 0)), acc, is_async=True)
            if EXTRA > 0:
                w_extra = gl.convert_layout(w, A_EXTRA)
                acc_extra = warpgroup_mma(w_extra, extra_smem.index(stage).permute((1, 0)), acc_extra, is_async=True)
            if not ONE_GROUP:
                left -= 1
                if left == 0:
                    left = group_steps
                    group_scales += ROWS
                    row_scale = gl.expand_dims(vector(group_scales, row, ROWS, ROW), 1)
            next_stage, phase = following(stage, phase, STAGES)
            next_w = form(part, next_stage, phase, row_scale, w_smem, s_smem, full, A, FORWARD, PAIRED_BF16)
            if EXTRA > 0:
                acc, acc_extra = warpgroup_mma_wait(0, deps=[acc, acc_extra])
                acc_extra = warpgroup_mma_init(acc_extra)
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            acc = warpgroup_mma_init(acc)
            mbarrier.arrive(empty.index(stage), count=1)
            w, stage = next_w, next_stage
        acc = warpgroup_mma(w, wide_smem.index(stage).permute((1, 0)), acc, is_async=True)
        if EXTRA > 0:
            w_extra = gl.convert_layout(w, A_EXTRA)
            acc_extra = warpgroup_mma(w_extra, extra_smem.index(stage).permute((1, 0)), acc_extra, is_async=True)
            total, total_extra = warpgroup_mma_wait(0, deps=[acc, acc_extra])
        else:
            total = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        stage, phase = following(stage, phase, STAGES)

        if HAS_BIAS or HAS_SHIFT:
            total += gl.expand_dims(offset, 1)
            if EXTRA > 0:
                total_extra += gl.expand_dims(gl.convert_layout(offset, gl.SliceLayout(1, ACC_EXTRA)), 1)
        wait_for_stores(0)  # the last tile's, out of the same memory
        y_smem.index(part).permute((1, 0)).store(total.to(y_smem.dtype))
        if EXTRA > 0:
            y_extra_smem.index(part).permute((1, 0)).store(total_extra.to(y_smem.dtype))
        fence_async_shared()
        store_box(out_wide, [m, row], y_smem.index(part))
        if EXTRA > 0:
            store_box(out_extra, [m + WIDE, row], y_extra_smem.index(part))
    wait_for_stores(0)


@gluon.jit
def producer(
    act_wide, act_extra, weight, depth_scales, wide_smem, extra_smem, w_smem, s_smem, full, empty,
    M, ROWS, steps, group_tiles,
    FORWARD: gl.constexpr, WIDE: gl.constexpr, EXTRA: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    row_tiles = gl.cdiv(ROWS, 128)
    tiles = gl.cdiv(M, WIDE + EXTRA) * row_tiles
    BYTES: gl.constexpr = DEPTH * (2 * (WIDE + EXTRA + 128) + 4)
    stage, phase = 0, 1  # of barriers that nobody has waited for yet
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, number = tile_origin(tile, WIDE + EXTRA, row_tiles)
        for step in range(steps):
            depth = step * DEPTH
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BYTES)
            if FORWARD:
                load_box(depth_scales, [number // group_tiles, depth], full.index(stage), s_smem.index(stage))
                load_box(weight, [number * 128, depth], full.index(stage), w_smem.index(stage))
            else:
                load_box(depth_scales, [0, depth], full.index(stage), s_smem.index(stage))
                load_box(weight, [depth, number * 128], full.index(stage), w_smem.index(stage))
            load_box(act_wide, [m, depth], full.index(stage), wide_smem.index(stage))
            if EXTRA > 0:
                load_box(act_extra, [m + WIDE, depth], full.index(stage), extra_smem.index(stage))
            stage, phase = following(stage, phase, STAGES)


@gluon.jit(do_not_specialize=["M"])
def product_kernel(
    act_wide,  # [M, depth], boxes of [WIDE, DEPTH]
    act_extra,  # the same, boxes of [EXTRA, DEPTH]; read if EXTRA
    weight,  # forward: [rows, depth], boxes of [128, DEPTH]; grad_input: [depth, rows], boxes of [DEPTH, 128]
    depth_scales,  # forward: v [groups, depth]; grad_input: u [1, depth]; float32, boxes of [1, DEPTH]
    out_wide,  # [M, rows], boxes of [WIDE, 64]
    out_extra,  # the same, boxes of [EXTRA, 64]; written if EXTRA
    row_scales,  # forward: u [rows]; grad_input: v [groups, rows]
    bias,  # [rows], read if HAS_BIAS
    shift,  # [rows], read if HAS_SHIFT
    M,
    ROWS,
    steps,  # of DEPTH each, through the whole depth
    group_tiles,  # forward: tiles of 128 rows in a group
    group_steps,  # grad_input: steps in a group; read unless ONE_GROUP
    FORWARD: gl.constexpr,
    ONE_GROUP: gl.constexpr,  # whether row_scales is the same for the whole depth
    HAS_BIAS: gl.constexpr,
    HAS_SHIFT: gl.constexpr,
    PAIRED_BF16: gl.constexpr,
    WIDE: gl.constexpr,
    EXTRA: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = act_wide.dtype
    wide_smem = gl.allocate_shared_memory(dtype, [STAGES, WIDE, DEPTH], act_wide.layout)
    if FORWARD:
        w_smem = gl.allocate_shared_memory(dtype, [STAGES, 128, DEPTH], weight.layout)
    else:
        w_smem = gl.allocate_shared_memory(dtype, [STAGES, DEPTH, 128], weight.layout)
    s_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, DEPTH], depth_scales.layout)
    y_smem = gl.allocate_shared_memory(dtype, [2, WIDE, 64], out_wide.layout)
    if EXTRA > 0:
        extra_smem = gl.allocate_shared_memory(dtype, [STAGES, EXTRA, DEPTH], act_extra.layout)
        y_extra_smem = gl.allocate_shared_memory(dtype, [2, EXTRA, 64], out_extra.layout)
    else:  # named and not touched
        extra_smem, y_extra_smem = wide_smem, y_smem
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    0,
                    row_scales,
                    bias,
                    shift,
                    out_wide,
                    out_extra,
                    wide_smem,
                    extra_smem,
                    w_smem,
                    s_smem,
                    y_smem,
                    y_extra_smem,
                    full,
                    empty,
                    M,
                    ROWS,
                    steps,
                    group_steps,
                    FORWARD,
                    ONE_GROUP,
                    HAS_BIAS,
                    HAS_SHIFT,
                    PAIRED_BF16,
                    WIDE,
                    EXTRA,
                    STAGES,
                ),
            ),
            (
                consumer,
                (
                    1,
                    row_scales,
                    bias,
                    shift,
                    out_wide,
                    out_extra,
                    wide_smem,
                    extra_smem,
                    w_smem,
                    s_smem,
                    y_smem,
                    y_extra_smem,
                    full,
                    empty,
                    M,
                    ROWS,
                    steps,
                    group_steps,
                    FORWARD,
                    ONE_GROUP,
                    HAS_BIAS,
                    HAS_SHIFT,
                    PAIRED_BF16,
                    WIDE,
                    EXTRA,
                    STAGES,
                ),
            ),
            (
                producer,
                (
                    act_wide,
                    act_extra,
                    weight,
                    depth_scales,
                    wide_smem,
                    extra_smem,
                    w_smem,
                    s_smem,
                    full,
                    empty,
                    M,
                    ROWS,
                    steps,
                    group_tiles,
                    FORWARD,
                    WIDE,
                    EXTRA,
                    DEPTH,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )
