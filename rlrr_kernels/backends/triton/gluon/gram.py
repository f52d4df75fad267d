"""Partial sums of du, dv and df on Hopper; G = dy^T x never leaves the registers.

With P = G * W:  du = P v,  dv = P^T u,  df = sum of dy over the tokens. A block sums a tile ``[128, 256]`` of G over
its share of the tokens: one warp fetches boxes of dy and x, two warpgroups hold 64 rows of G each. They then reduce P
to partial sums, which the plain kernels' ``sum_partials_kernel`` adds in a fixed order. For df the blocks that share
tokens, one for each tile of K, take turns: each adds up those of its steps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rlrr_kernels.backends.triton.gluon.names import (
    fence_async_shared,
    load_box,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.jit
def halves(g, COLS: gl.constexpr, LAYOUT: gl.constexpr):
    """``[64, COLS]`` -> its left and right half."""
    left, right = gl.split(gl.permute(gl.reshape(g, [64, 2, COLS // 2]), (0, 2, 1)))
    return gl.convert_layout(left, LAYOUT), gl.convert_layout(right, LAYOUT)


@gluon.jit
def reduce(g, first, w, u_col, v, dv_row, row, in_n, K, LAYOUT: gl.constexpr):
    """Store the partial dv of 64 rows and 64 columns of G, from column ``first`` on, and return their partial du."""
    k = first + gl.arange(0, 64, gl.SliceLayout(0, LAYOUT))
    in_k = k < K
    inside = gl.expand_dims(in_n, 1) & gl.expand_dims(in_k, 0)
    at = gl.expand_dims(row.to(gl.int64) * K, 1) + gl.expand_dims(k, 0)
    # outside of the matrix G is infinite or NaN where dy or x is: times a 0 of W it would be NaN
    p = gl.where(inside, g, 0.0) * gl.load(w + at, mask=inside, other=0.0).to(gl.float32)
    v_row = gl.load(v + k, mask=in_k, other=0.0)
    gl.store(dv_row + k, gl.sum(p * gl.expand_dims(u_col, 1), axis=0), mask=in_k)
    return gl.sum(p * gl.expand_dims(v_row, 0), axis=1)


@gluon.jit
def consumer(
    part: gl.constexpr, dy_smem, x_smem, full, empty, w, u, v, du_partial, dv_partial, df_partial,
    n_start, k_tile, k_tiles, du_row, dv_row, steps, N, K, HAS_SHIFT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    acc = warpgroup_mma_init(gl.zeros([64, 256], gl.float32, ACC))
    total = gl.zeros([16, 64], gl.float32, ROWS)
    mine = k_tile
    # without this the accumulator could leave the loop unwritten, and ptxas then serialises every product
    gl.assume(steps > 0)
    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        dy = dy_smem.index(stage).slice(part * 64, 64, dim=1)
        if HAS_SHIFT:
            if mine == 0:
                # a thread's own rows at once: it keeps a quarter of the registers
                rows = gl.sum(gl.reshape(dy.load(ROWS).to(gl.float32), [4, 16, 64]), axis=0)
                total += gl.convert_layout(rows, ROWS)
                mine = k_tiles
            mine -= 1
        acc = warpgroup_mma(dy.permute((1, 0)), x_smem.index(stage), acc, is_async=True)
        # the product of the step before has ended, this one goes on
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    g = warpgroup_mma_wait(0, deps=[acc])

    # partial sums are few: 32 bits count their bytes
    at = du_row * N
    if HAS_SHIFT:
        cols = n_start + part * 64 + gl.arange(0, 64, gl.SliceLayout(0, ROWS))
        gl.store(df_partial + at + cols, gl.sum(total, axis=0), mask=cols < N)
    row = n_start + part * 64 + gl.arange(0, 64, gl.SliceLayout(1, ROWS))
    in_n = row < N
    u_col = gl.load(u + row, mask=in_n, other=0.0).to(gl.float32)
    dv_at = dv_partial + (2 * dv_row + part) * K
    # a quarter of a tile at a time, as W lies in memory: more of W beside G does not fit in the registers
    left, right = halves(g, 256, HALF)
    first = k_tile * 256
    du = gl.zeros([64], gl.float32, gl.SliceLayout(1, ROWS))
    for half in gl.static_range(2):
        one, other = halves(left if half == 0 else right, 128, ROWS)
        du += reduce(one, first + half * 128, w, u_col, v, dv_at, row, in_n, K, ROWS)
        du += reduce(other, first + half * 128 + 64, w, u_col, v, dv_at, row, in_n, K, ROWS)
    gl.store(du_partial + at + row, du, mask=in_n)


@gluon.jit
def producer(
    dy_boxes, x_boxes, dy_smem, x_smem, full, empty, n_start, k_tile, first_token, steps, STAGES: gl.constexpr
):
    for step in range(steps):
        stage = step % STAGES
        token = first_token + step * 64
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 64 * 2 * (128 + 256))
        load_box(dy_boxes, [token, n_start], full.index(stage), dy_smem.index(stage))
        load_box(x_boxes, [token, k_tile * 256], full.index(stage), x_smem.index(stage))


@gluon.jit(do_not_specialize=["M", "split_tokens", "splits"])
def gram_kernel(
    dy_boxes,  # [M, N], boxes of [64, 128]
    x_boxes,  # [M, K], boxes of [64, 256]
    w,  # [N, K], contiguous
    u,  # [N]
    v,  # [groups, K] float32
    du_partial,  # [splits * k_tiles, N] float32
    dv_partial,  # [groups, splits * 2 * row tiles of a group, K] float32
    df_partial,  # [splits * k_tiles, N] float32, written if HAS_SHIFT
    M,
    split_tokens,  # of one split, a multiple of 64
    splits,
    N,
    K,
    group_rows,  # N, or a multiple of 128
    HAS_SHIFT: gl.constexpr,
    STAGES: gl.constexpr,
):
    # the tiles of one split run together: they share its rows of dy and x in L2
    k_tiles = gl.cdiv(K, 256)
    group_tiles = gl.cdiv(group_rows, 128)
    n_tiles = (N // group_rows) * group_tiles
    program = gl.program_id(0)
    k_tile = program % k_tiles
    n_tile = (program // k_tiles) % n_tiles
    split = program // (k_tiles * n_tiles)
    group = n_tile // group_tiles
    first_token = split * split_tokens
    steps = gl.cdiv(gl.minimum(split_tokens, M - first_token), 64)
    du_row = split * k_tiles + k_tile
    dv_row = (group * splits + split) * group_tiles + n_tile % group_tiles

    dtype: gl.constexpr = x_boxes.dtype
    dy_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, 128], dy_boxes.layout)
    x_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, 256], x_boxes.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    v += group * K
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    0,
                    dy_smem,
                    x_smem,
                    full,
                    empty,
                    w,
                    u,
                    v,
                    du_partial,
                    dv_partial,
                    df_partial,
                    n_tile * 128,
                    k_tile,
                    k_tiles,
                    du_row,
                    dv_row,
                    steps,
                    N,
                    K,
                    HAS_SHIFT,
                    STAGES,
                ),
            ),
            (
                consumer,
                (
                    1,
                    dy_smem,
                    x_smem,
                    full,
                    empty,
                    w,
                    u,
                    v,
                    du_partial,
                    dv_partial,
                    df_partial,
                    n_tile * 128,
                    k_tile,
                    k_tiles,
                    du_row,
                    dv_row,
                    steps,
                    N,
                    K,
                    HAS_SHIFT,
                    STAGES,
                ),
            ),
            (
                producer,
                (dy_boxes, x_boxes, dy_smem, x_smem, full, empty, n_tile * 128, k_tile, first_token, steps, STAGES),
            ),
        ],
        [4, 1],
        [240, 24],
    )
