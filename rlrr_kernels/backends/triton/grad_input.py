"""dx = dy W' with W' = W * (1 + u v) formed in registers."""

import triton
import triton.language as tl

from rlrr_kernels.backends.triton.tiles import int64, load_u, load_v, narrow, operand, rescale


@triton.jit(do_not_specialize=["M", "split_steps"])
def grad_input_kernel(
    dy,  # [M, N]
    w,  # [N, K]
    u,  # [N, RANK]
    v,  # [groups, RANK, K]
    dx,  # [M, K]; if SPLIT float32 [splits, M, K], to be added up
    M,
    split_steps,  # steps of BLOCK_N that one split sums over; read if SPLIT
    N,
    K,
    group_rows,
    stride_dym,
    stride_dyn,
    stride_wn,
    stride_wk,
    stride_vg,
    stride_dxm,
    RANK: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    PAIRED_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUND_TF32: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k_tiles = tl.cdiv(K, BLOCK_K)
    m_start = (tl.program_id(0) // k_tiles) * BLOCK_M
    k_start = (tl.program_id(0) % k_tiles) * BLOCK_K

    offs_m = m_start + tl.arange(0, BLOCK_M)
    offs_k = k_start + tl.arange(0, BLOCK_K)
    offs_n = tl.arange(0, BLOCK_N)
    in_k = offs_k < K
    v_k = load_v(v + offs_k, in_k, K, RANK)
    rows_m = tl.minimum(offs_m, M - 1).to(tl.int64)
    dy_ptrs = dy + rows_m[:, None] * stride_dym + offs_n[None, :].to(tl.int64) * stride_dyn
    w_ptrs = w + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk

    # the sum over n walks the groups one after another; no step crosses into the next
    steps = tl.cdiv(group_rows, BLOCK_N)
    first = 0
    last = (N // group_rows) * steps
    if SPLIT:
        first = tl.program_id(1) * split_steps
        last = tl.minimum(first + split_steps, last)
        dx += int64(tl.program_id(1)) * M * K
    # without this the accumulator could leave the loop unwritten, and ptxas then serialises every wgmma
    tl.assume(first < last)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in tl.range(first, last):
        if ONE_GROUP:
            n = step * BLOCK_N
            n_end = N
        else:
            group = step // steps
            n = group * group_rows + (step % steps) * BLOCK_N
            n_end = (group + 1) * group_rows
            v_k = load_v(v + group * stride_vg + offs_k, in_k, K, RANK)
        if EVEN_N:
            u_n = load_u(u + n * RANK, offs_n, None, RANK)
            w_tile = tl.load(w_ptrs + int64(n) * stride_wn, mask=in_k[None, :], other=0.0)
            dy_tile = tl.load(dy_ptrs + int64(n) * stride_dyn)
        else:
            in_n = n + offs_n < n_end
            u_n = load_u(u + n * RANK, offs_n, in_n, RANK)
            w_tile = tl.load(w_ptrs + int64(n) * stride_wn, mask=in_n[:, None] & in_k[None, :], other=0.0)
            dy_tile = tl.load(dy_ptrs + int64(n) * stride_dyn, mask=in_n[None, :], other=0.0)
        rescaled = rescale(w_tile, u_n, v_k, dy_tile.dtype, RANK, PAIRED_BF16, ROUND_TF32, EMULATE_BF16)
        acc = tl.dot(operand(dy_tile, EMULATE_BF16), rescaled, acc, input_precision=PRECISION)

    if not SPLIT:
        acc = narrow(acc, dx.dtype.element_ty, EMULATE_BF16)
    dx_ptrs = dx + offs_m[:, None].to(tl.int64) * stride_dxm + offs_k[None, :]
    tl.store(dx_ptrs, acc, mask=(offs_m[:, None] < M) & in_k[None, :])
