"""y = x W'^T + b + f with W' = W * (1 + u v) formed in registers (paper Eq. 16 and 20)."""

import triton
import triton.language as tl

from rlrr_kernels.backends.triton.tiles import group_tile, int64, load_u, load_v, narrow, operand, rescale


@triton.jit(do_not_specialize=["M", "split_steps"])
def forward_kernel(
    x,  # [M, K]
    w,  # [N, K]
    v,  # [groups, RANK, K]
    u,  # [N, RANK]
    bias,  # [N], read if HAS_BIAS
    shift,  # [N], read if HAS_SHIFT
    y,  # [M, N]; if SPLIT float32 [splits, M, N], to be added up
    M,
    split_steps,  # steps of BLOCK_K that one split sums over; read if SPLIT
    N,
    K,
    group_rows,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_vg,
    stride_ym,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PAIRED_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if SPLIT:
        k_first = tl.program_id(1) * split_steps * BLOCK_K
        k_last = tl.minimum(k_first + split_steps * BLOCK_K, K)
        y += int64(tl.program_id(1)) * M * N
    else:
        k_first = 0
        k_last = K
    # without this the accumulator could leave the loop unwritten, and ptxas then serialises every wgmma
    tl.assume(k_first < k_last)

    # n runs fastest: the programs in flight share a few row bands of x and all of W, which fits in L2
    n_tiles = (N // group_rows) * tl.cdiv(group_rows, BLOCK_N)
    m_start = (tl.program_id(0) // n_tiles) * BLOCK_M
    group, n_start, n_end = group_tile(tl.program_id(0) % n_tiles, group_rows, BLOCK_N)

    offs_m = m_start + tl.arange(0, BLOCK_M)
    offs_n = n_start + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if RANK == 1:  # by hand, so that rank 1 is compiled as if there were no other
        u_n = (tl.load(u + offs_n, mask=offs_n < n_end, other=0.0).to(tl.float32),)
    else:
        u_n = load_u(u, offs_n, offs_n < n_end, RANK)
    # rows past the edge repeat the last one: what they compute is never stored
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    x_ptrs = x + rows_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w + rows_n[:, None] * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk
    v_ptrs = v + group * stride_vg + offs_k[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(k_first, k_last, BLOCK_K):
        if EVEN_K:
            w_tile = tl.load(w_ptrs + int64(k) * stride_wk)
            v_k = load_v(v_ptrs + k, None, K, RANK)
            x_tile = tl.load(x_ptrs + int64(k) * stride_xk)
        else:
            in_k = offs_k[None, :] < K - k
            w_tile = tl.load(w_ptrs + int64(k) * stride_wk, mask=in_k, other=0.0)
            v_k = load_v(v_ptrs + k, in_k, K, RANK)
            x_tile = tl.load(x_ptrs + int64(k) * stride_xk, mask=in_k, other=0.0)
        rescaled = rescale(w_tile, u_n, v_k, x_tile.dtype, RANK, PAIRED_BF16, ROUND_TF32, EMULATE_BF16)
        acc = tl.dot(operand(x_tile, EMULATE_BF16), rescaled.T, acc, input_precision=PRECISION)

    in_n = offs_n < n_end
    if HAS_BIAS:
        acc += tl.load(bias + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        acc += tl.load(shift + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if not SPLIT:
        acc = narrow(acc, y.dtype.element_ty, EMULATE_BF16)
    y_ptrs = y + offs_m[:, None].to(tl.int64) * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc, mask=(offs_m[:, None] < M) & in_n[None, :])
