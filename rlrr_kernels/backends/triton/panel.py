"""A panel of W' = W * (1 + U V), formed once for all tokens: a BLAS multiplies by it, if the rank is larger."""

import triton
import triton.language as tl

from rlrr_kernels.backends.triton.tiles import group_tile, int64, load_float, narrow, widen


@triton.jit(do_not_specialize=["group_rows", "rank"])
def panel_kernel(
    w,  # [rows, columns], of as many groups as the panel has
    u,  # [rows, rank]
    v,  # [groups, rank, K], from the panel's first group and column on
    panel,  # [rows, columns]
    group_rows,  # rows of each group in the panel
    rank,
    columns,
    stride_wn,
    stride_wk,
    K,
    PAIRED_BF16: tl.constexpr,
    EMULATE_BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    k_tiles = tl.cdiv(columns, BLOCK_K)
    group, n_start, n_end = group_tile(tl.program_id(0) // k_tiles, group_rows, BLOCK_N)
    offs_n = n_start + tl.arange(0, BLOCK_N)
    offs_k = (tl.program_id(0) % k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_n = offs_n < n_end
    in_k = offs_k < columns
    u_ptrs = u + offs_n * rank
    v_ptrs = v + int64(group * rank) * K + offs_k
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for j in tl.range(rank):
        product += load_float(u_ptrs + j, in_n)[:, None] * load_float(v_ptrs + j * K, in_k)[None, :]
    inside = in_n[:, None] & in_k[None, :]
    rows, cols = offs_n[:, None].to(tl.int64), offs_k[None, :].to(tl.int64)
    w_tile = tl.load(w + rows * stride_wn + cols * stride_wk, mask=inside, other=0.0)
    formed = narrow(widen(w_tile, PAIRED_BF16) * (1.0 + product), panel.dtype.element_ty, EMULATE_BF16)
    tl.store(panel + rows * columns + cols, formed, mask=inside)
