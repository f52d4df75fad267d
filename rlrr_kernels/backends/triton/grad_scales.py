"""dU, dV and df in one launch over dy and x; G = dy^T x never leaves the registers.

With P = G * W:  dU = P V^T,  dV = U^T P,  df = sum of dy over the tokens. Both are
linear in G, so a program may hold any share of the tokens: it reduces its tile
of G against its tile of W into partial sums, and :func:`sum_partials_kernel`
adds the partials in a fixed order. No atomics: two runs agree bit for bit.
"""

import triton
import triton.language as tl

from rlrr_kernels.backends.triton.tiles import group_tile, int64, operand, round_to_tf32


@triton.jit
def halves(tile):
    """``[R, C]`` -> its left and right half, each ``[R, C / 2]``."""
    rows: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def against_weight(g, w, offs_n, in_n, offs_k, K, stride_wn, stride_wk):
    """P = G * W of one tile of G."""
    inside = in_n[:, None] & (offs_k < K)[None, :]
    w_ptrs = w + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    # outside the group and the matrix G is infinite or NaN where dy or x is: times a 0 of W it would be NaN
    return tl.where(inside, g, 0.0) * tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def reduce(p, u_col, v, dv_row, offs_k, K):
    """Store the partial dv of one tile of P and return its partial du ``[rows]``."""
    in_k = offs_k < K
    v_row = tl.load(v + offs_k, mask=in_k, other=0.0).to(tl.float32)
    tl.store(dv_row + offs_k, tl.sum(p * u_col[:, None], axis=0), mask=in_k)
    return tl.sum(p * v_row[None, :], axis=1)


@triton.jit(do_not_specialize=["M", "split_rows", "splits"])
def grad_scales_kernel(
    dy,  # [M, N]
    x,  # [M, K]
    w,  # [N, K]
    u,  # [N, RANK]
    v,  # [groups, RANK, K] float32
    du_partial,  # [splits * k_tiles, N] float32; if RANK > 1 [splits * k_tiles * 2, N, RANK], from half a tile each
    dv_partial,  # [groups, splits * tiles of a group, RANK, K] float32
    df_partial,  # [splits, N] float32, written if HAS_SHIFT
    M,
    split_rows,  # tokens of one split, a multiple of BLOCK_M
    splits,
    N,
    K,
    group_rows,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_vg,
    RANK: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The tiles of one split run together: they share its rows of dy and x in L2. Where f trains,
    # each row of tiles has one program more, which only adds up dy: summing inside the product's
    # loop would pull dy through the registers of every program, and here it comes from L2.
    k_tiles = tl.cdiv(K, BLOCK_K)
    columns = k_tiles + (1 if HAS_SHIFT else 0)
    group_tiles = tl.cdiv(group_rows, BLOCK_N)
    n_tiles = (N // group_rows) * group_tiles
    pid = tl.program_id(0)
    k_tile = pid % columns
    pid_n = (pid // columns) % n_tiles
    split = pid // (columns * n_tiles)
    group, n_start, n_end = group_tile(pid_n, group_rows, BLOCK_N)
    m_first = split * split_rows
    m_last = tl.minimum(m_first + split_rows, M)
    offs_n = n_start + tl.arange(0, BLOCK_N)
    in_n = offs_n < n_end

    if k_tile == k_tiles:
        ROWS: tl.constexpr = 32
        total = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for m in tl.range(m_first, m_last, ROWS):
            offs_m = m + tl.arange(0, ROWS)[:, None]
            ptrs = dy + offs_m.to(tl.int64) * stride_dym + offs_n[None, :].to(tl.int64) * stride_dyn
            total += tl.load(ptrs, mask=(offs_m < m_last) & in_n[None, :], other=0.0).to(tl.float32)
        tl.store(df_partial + split * N + offs_n, tl.sum(total, axis=0), mask=in_n)
    else:
        k_start = k_tile * BLOCK_K
        offs_k = k_start + tl.arange(0, BLOCK_K)
        offs_m = tl.arange(0, BLOCK_M)[:, None]
        in_k = offs_k[None, :] < K
        dy_ptrs = dy + (offs_m.to(tl.int64) * stride_dym + offs_n[None, :].to(tl.int64) * stride_dyn)
        x_ptrs = x + (offs_m.to(tl.int64) * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk)
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for m in tl.range(m_first, m_last, BLOCK_M):
            in_m = offs_m < m_last - m
            dy_tile = tl.load(dy_ptrs + int64(m) * stride_dym, mask=in_m & in_n[None, :], other=0.0)
            x_tile = tl.load(x_ptrs + int64(m) * stride_xm, mask=in_m & in_k, other=0.0)
            if ROUND_TF32:
                # one operand is enough to stay near a product of two rounded ones
                dy_tile = round_to_tf32(dy_tile)
            acc = tl.dot(
                operand(dy_tile, EMULATE_BF16).T, operand(x_tile, EMULATE_BF16), acc, input_precision=PRECISION
            )

        # half a tile at a time: reducing all of it at once does not fit in the registers
        if RANK == 1:
            u_col = tl.load(u + offs_n, mask=in_n, other=0.0).to(tl.float32)
        dv_row = dv_partial + int64((group * splits + split) * group_tiles + pid_n % group_tiles) * (RANK * K)
        left, right = halves(acc)
        offs_half = k_start + tl.arange(0, BLOCK_K // 2)
        v_group = v + group * stride_vg
        if RANK == 1:
            p = against_weight(left, w, offs_n, in_n, offs_half, K, stride_wn, stride_wk)
            du = reduce(p, u_col, v_group, dv_row, offs_half, K)
            offs_half += BLOCK_K // 2
            p = against_weight(right, w, offs_n, in_n, offs_half, K, stride_wn, stride_wk)
            du += reduce(p, u_col, v_group, dv_row, offs_half, K)
            du_row = du_partial + int64(split * k_tiles + k_tile) * N
            tl.store(du_row + offs_n, du, mask=in_n)
        else:
            for half in tl.static_range(2):
                g = left if half == 0 else right
                p = against_weight(g, w, offs_n, in_n, offs_half, K, stride_wn, stride_wk)
                du_rows = du_partial + (int64(2 * (split * k_tiles + k_tile) + half) * N + offs_n) * RANK
                for j in tl.range(RANK):
                    u_col = tl.load(u + offs_n * RANK + j, mask=in_n, other=0.0).to(tl.float32)
                    du = reduce(p, u_col, v_group + j * K, dv_row + j * K, offs_half, K)
                    tl.store(du_rows + j, du, mask=in_n)
                offs_half += BLOCK_K // 2


@triton.jit
def sum_rows(partial, out, rows, length, start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """out[c] = sum over rows of partial [rows, length], for COLS columns from ``start`` on."""
    cols = start + tl.arange(0, COLS)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for r in tl.range(0, rows, ROWS):
        offs_r = r + tl.arange(0, ROWS)[:, None]
        ptrs = partial + offs_r.to(tl.int64) * length + cols
        total += tl.load(ptrs, mask=(offs_r < rows) & (cols < length), other=0.0)
    tl.store(out + start + tl.arange(0, COLS), tl.sum(total, axis=0), mask=start + tl.arange(0, COLS) < length)


@triton.jit(do_not_specialize=["du_rows", "dv_rows", "df_rows"])
def sum_partials_kernel(
    du_partial,
    dv_partial,
    df_partial,
    du,  # [N, RANK]
    dv,  # [groups, RANK, K]
    df,  # [N], written if HAS_SHIFT
    du_rows,  # rows of partials behind each output, as laid out by grad_scales_kernel
    dv_rows,
    df_rows,
    N,
    K,
    groups,
    RANK: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Add the partial sums; the order depends on the shapes alone. One launch for all three."""
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(N * RANK, COLS)
    k_blocks = tl.cdiv(K * RANK, COLS)
    if pid < n_blocks:
        sum_rows(du_partial, du, du_rows, N * RANK, pid * COLS, ROWS, COLS)
    elif pid < n_blocks + groups * k_blocks:
        group = (pid - n_blocks) // k_blocks
        start = ((pid - n_blocks) % k_blocks) * COLS
        part = dv_partial + int64(group * dv_rows) * (K * RANK)
        sum_rows(part, dv + group * (K * RANK), dv_rows, K * RANK, start, ROWS, COLS)
    elif HAS_SHIFT:
        sum_rows(df_partial, df, df_rows, N, (pid - n_blocks - groups * k_blocks) * COLS, ROWS, COLS)
