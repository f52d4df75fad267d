"""The LayerNorm kernels against float64, and what they compile to."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from benchmarks.disassemble import as_case, probe
from rlrr_kernels import use_backend
from rlrr_kernels.backends import choice, reference, triton
from rlrr_kernels.backends.triton import launch, norm
from rlrr_kernels.check.yardstick import relative_error
from rlrr_kernels.ops import layer_norm
from tests.backends.triton.test_compile import TARGETS
from tests.layers.test_norm_numerics import check
from tests.oracle import Answer, strided

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-6


def make(m, d, dtype=SINGLE, weight_dtype=SINGLE, affine_dtype=SINGLE, device="cpu", seed=0):
    """x, dy ``[M, D]`` and w, b, s, t ``[D]``, all of a size that matters."""
    g = torch.Generator().manual_seed(seed + 7919 * m + d)
    x, dy = (torch.randn(m, d, generator=g).to(device, dtype) for _ in range(2))
    w, b = (torch.randn(d, generator=g).to(device, weight_dtype) for _ in range(2))
    s, t = (torch.randn(d, generator=g).to(device, affine_dtype) for _ in range(2))
    return x, dy, w, b, s, t


def solve(x, dy, w, b, s, t, dtype=None, programs=None):
    y, mean, rstd = norm.layer_norm(x, w, b, s, t, EPS, dtype or x.dtype)
    dx, ds, dt = norm.layer_norm_backward(dy, x, mean, rstd, w, b, s, True, programs=programs)
    return Answer(y, dx, ds, dt, dt)


def check_problem(x, dy, w, b, s, t, programs=None):
    check(solve(x, dy, w, b, s, t, programs=programs), x, dy, w, b, s, t, EPS)


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(
    ("m", "d"),
    [(1, 2), (1, 768), (37, 7), (197, 48), (33, 192), (5, 2049)],
)
def test_shapes(triton_device, m, d, dtype):
    # few programs, so that each meets several tiles, the last ones cut short
    check_problem(*make(m, d, dtype, device=triton_device), programs=min(2, m))


def test_the_longest_row(triton_device):
    check_problem(*make(2, norm.MAX_VECTOR_D, BF16, device=triton_device), programs=1)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize(("weight_dtype", "affine_dtype"), [(HALF, SINGLE), (BF16, BF16), (SINGLE, torch.float64)])
def test_parameters_of_another_dtype(triton_device, weight_dtype, affine_dtype, dtype):
    check_problem(*make(40, 100, dtype, weight_dtype, affine_dtype, device=triton_device))


@pytest.mark.parametrize("present", [(True, False), (False, True), (False, False)])
def test_weight_and_bias_each_absent(triton_device, present):
    x, dy, w, b, s, t = make(40, 100, device=triton_device)
    w, b = (p if there else None for p, there in zip((w, b), present, strict=True))
    check_problem(x, dy, w, b, s, t)


@pytest.mark.parametrize("how", ["transposed", "sliced", "columns of a wider matrix", "off by one element"])
def test_strides(triton_device, how):
    x, dy, *rest = make(45, 70, HALF, device=triton_device)
    check_problem(strided(x, how), strided(dy, how), *rest)


def test_parameters_need_not_be_contiguous(triton_device):
    x, dy, *rest = make(20, 50, device=triton_device)
    check_problem(x, dy, *(torch.stack((p, p + 1), 1)[:, 0] for p in rest))


def test_a_gradient_that_is_one_number(triton_device):
    """What ``y.sum().backward()`` gives: strides of 0."""
    x, _, w, b, s, t = make(20, 50, device=triton_device)
    _, mean, rstd = norm.layer_norm(x, w, b, s, t, EPS, SINGLE)
    one = torch.ones((), device=triton_device).expand(20, 50)
    _, _, dt = norm.layer_norm_backward(one, x, mean, rstd, w, b, s, True)
    assert torch.equal(dt, torch.full_like(dt, 20.0))


def test_the_statistics_are_those_of_layer_norm_even_far_from_zero(triton_device):
    x, _, w, b, s, t = make(30, 300, device=triton_device)
    x = x + 1000
    _, mean, rstd = norm.layer_norm(x, w, b, s, t, EPS, SINGLE)
    exact = x.double()
    assert mean.shape == rstd.shape == (30, 1)
    assert relative_error(mean, exact.mean(1, keepdim=True)) < 1e-6
    assert relative_error(rstd, (exact.var(1, keepdim=True, correction=0) + EPS).rsqrt()) < 1e-5


def test_eps_is_added_to_the_variance(triton_device):
    x, _, w, b, s, t = make(5, 64, device=triton_device)
    y, *_ = norm.layer_norm(torch.full_like(x, 3.0), w, b, s, t, EPS, SINGLE)
    torch.testing.assert_close(y, (b * s + t).expand(5, 64))
    y, *_ = norm.layer_norm(x, w, b, s, t, 0.5, SINGLE)
    torch.testing.assert_close(y, F.layer_norm(x, (64,), w, b, 0.5) * s + t, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "out"), [(BF16, SINGLE), (HALF, SINGLE), (SINGLE, BF16), (SINGLE, HALF)], ids=str)
def test_the_result_may_have_another_dtype_than_x(triton_device, dtype, out):
    """Under autocast: 16-bit rows give float32, without a float32 copy of them."""
    x, dy, *rest = make(20, 96, dtype, device=triton_device)
    got = solve(x, dy, *rest, dtype=out)
    wide = solve(x.float(), dy.float(), *rest)
    assert got.y.dtype is out
    assert torch.equal(got.y, wide.y.to(out))
    assert got.dx.dtype is dtype
    assert torch.equal(got.dx, wide.dx.to(dtype))


def test_without_a_gradient_for_x_the_others_are_the_same(triton_device):
    x, dy, w, b, s, t = make(20, 96, device=triton_device)
    _, mean, rstd = norm.layer_norm(x, w, b, s, t, EPS, SINGLE)
    _, ds, dt = norm.layer_norm_backward(dy, x, mean, rstd, w, b, s, True)
    dx, *others = norm.layer_norm_backward(dy, x, mean, rstd, w, b, s, False)
    assert dx.shape == (0, 96)
    assert torch.equal(others[0], ds)
    assert torch.equal(others[1], dt)


def test_doubling_the_scale_doubles_every_bit(triton_device):
    """s = 2 rounds nothing: y and dx are twice those with s = 1; ds and dt do not know s."""
    x, dy, w, b, s, t = make(50, 200, device=triton_device)
    one = solve(x, dy, w, b, torch.ones_like(s), torch.zeros_like(t))
    two = solve(x, dy, w, b, torch.full_like(s, 2.0), torch.zeros_like(t))
    assert torch.equal(two.y, 2 * one.y)
    assert torch.equal(two.dx, 2 * one.dx)
    assert torch.equal(two.du, one.du)
    assert torch.equal(two.dv, one.dv)


@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
def test_dy_y_equals_s_ds_plus_t_dt(triton_device, dtype):
    """y is linear in (s, t), so both are the sum of dy y; on float32 results, whatever x is."""
    x, dy, w, b, s, t = make(100, 130, dtype, device=triton_device)
    got = solve(x, dy, w, b, s, t, dtype=SINGLE)
    left = (dy.double() * got.y.double()).sum()
    right = (s.double() * got.du.double()).sum() + (t.double() * got.dv.double()).sum()
    assert abs(left - right) < 1e-6 * (dy.double() * got.y.double()).abs().sum()


def test_dx_is_orthogonal_to_what_layer_norm_forgets(triton_device):
    """LayerNorm forgets a row's mean and scale: dx sums to 0 over a row, alone and against xhat."""
    x, dy, w, b, s, t = make(25, 500, device=triton_device)
    dx = solve(x, dy, w, b, s, t).dx.double()
    size = dx.abs().sum(1)
    assert (dx.sum(1).abs() / size).max() < 1e-6
    xhat = F.layer_norm(x.double(), (500,))
    assert ((dx * xhat).sum(1).abs() / size).max() < 1e-5


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_rows_shared_among_programs_give_the_same_sums_bit_for_bit_each_time(triton_device, programs):
    problem = make(130, 60, BF16, device=triton_device)
    first = solve(*problem, programs=programs)
    check(first, *problem, EPS)
    again = solve(*problem, programs=programs)
    for name in ("y", "dx", "du", "dv"):
        assert torch.equal(getattr(first, name), getattr(again, name))


@pytest.mark.parametrize("d", [1, 7, 192, 768, 1280, 4096, norm.MAX_VECTOR_D])
def test_a_tile_holds_the_row_in_the_registers_of_its_warps(d):
    tile = norm._tile(d)
    assert tile.block_d >= d > tile.block_d // 2
    elements = tile.rows * tile.block_d
    assert elements >= norm.TILE
    assert elements <= 32 * (8 if d <= norm.MAX_D else 16) * tile.warps
    assert tile.warps <= 16


def test_programs_fill_the_gpu_and_no_more(monkeypatch):
    monkeypatch.setattr(launch, "device_of", lambda x: TARGETS["sm_90"])
    tile = norm._tile(768)
    rows = tile.rows
    assert norm._programs(torch.empty(1, 768), tile) == 1
    assert norm._programs(torch.empty(10 * rows + 1, 768), tile) == 11
    assert norm._programs(torch.empty(100_000, 768, device="meta"), tile) == 132 * 3
    assert norm._programs(torch.empty(100_000, 8192, device="meta"), norm._tile(8192)) == 132


def test_what_the_kernels_cannot_serve_is_refused_with_the_reason_or_left_to_plain_pytorch(triton_device):
    cases = [
        (torch.randn(2, 8193, device=triton_device), "rows of 8193 elements: .* 8192 in multiples of 16"),
        (torch.randn(2, 8208, device=triton_device), "rows of 8208 elements"),
        (torch.randn(2, 4097, device=triton_device), "rows of 4097 elements: .* registers, 4096"),
        (torch.randn(2, 8, dtype=torch.float64, device=triton_device), "float64"),
    ]
    for x, words in cases:
        s = torch.ones(x.shape[1], dtype=x.dtype, device=triton_device)
        with (
            use_backend("triton"),
            pytest.raises(RuntimeError, match=f"backend 'triton' cannot serve LayerNorm: .*{words}"),
        ):
            layer_norm.layer_norm(x, None, None, s, s, EPS, x.dtype)
        y, *_ = layer_norm.layer_norm(x, None, None, s, s, EPS, x.dtype)
        torch.testing.assert_close(y, F.layer_norm(x, x.shape[1:], eps=EPS) + 1)


def test_the_kernels_serve_when_asked_and_by_default_on_a_gpu_alone(triton_device, monkeypatch):
    x = torch.randn(4, 8, device=triton_device)
    with use_backend("triton"):
        assert choice.module_for_layer_norm(x) is triton
    for name in ("reference", "cpu", "cuda"):
        with use_backend(name):
            assert choice.module_for_layer_norm(x) is reference
    assert choice.module_for_layer_norm(x) is (triton if triton_device == "cuda" else reference)
    monkeypatch.setitem(choice._loaded, "triton", "it cannot be imported: no such thing")
    with use_backend("triton"), pytest.raises(RuntimeError, match="it cannot be imported: no such thing"):
        choice.module_for_layer_norm(x)


#: ViT-T, ViT-B, longer rows, the longest; and rows that load by the element
WIDTHS = (192, 768, norm.MAX_D, norm.MAX_VECTOR_D, norm.MAX_D - 1)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_no_width_spills_and_backward_is_resident_as_often_as_the_grid_counts_on(arch):
    cases = [
        as_case("layer_norm", "half", dtype=dtype, weight_dtype="float32", m=12_608, n=1, k=d, groups=1)
        for d in WIDTHS
        for dtype in (("bfloat16", "float32") if d == 768 else ("bfloat16",))
    ]
    reports = probe({"device": dataclasses.asdict(TARGETS[arch]), "cases": cases})
    assert len(reports) == 3 * len(cases)
    assert {r["name"] for r in reports} == {"forward_kernel", "backward_kernel", "sum_partials_kernel"}
    spilled = [r for r in reports if r["stack"] > 0]
    assert not spilled, "\n".join(str(r) for r in spilled)
    for r in reports:
        warps = norm._tile(r["case"]["k"]).warps
        resident = 65_536 // (32 * warps * r["registers"])
        assert resident >= max(1, norm.WARPS_PER_MULTIPROCESSOR // warps), r
