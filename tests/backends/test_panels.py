"""Plain PyTorch in panels: results with many panels, memory, and sizes of panels."""

from unittest import mock

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measures import peak_extra_bytes
from rlrr_kernels.backends import panels
from tests.backends.test_numerics import RESULTS, solve
from tests.oracle import Answer, check, make_problem, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
SHAPES = [  # M, N, K, groups
    (65, 130, 67, 1),
    (70, 96, 131, 3),
    (40, 60, 24, 20),  # groups of three rows
    (300, 17, 300, 1),
    (33, 300, 17, 2),
]


@pytest.fixture
def many(monkeypatch):
    """So little scratch that small problems have many panels and many chunks of tokens."""
    monkeypatch.setattr(panels, "SCRATCH", 12 << 10)
    monkeypatch.setattr(panels, "TOKENS", 4 << 10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 9])
def test_many_panels(many, rank, pair, shape):
    p = make_problem(*shape, *pair, rank=rank)
    with (
        mock.patch.object(torch, "mm", wraps=torch.mm) as mm,
        mock.patch.object(torch, "addmm", wraps=torch.addmm) as y,
    ):
        got = solve(p, "panels")
    check(p, got)
    assert y.call_count >= max(2, shape[3])
    assert mm.call_count >= 2


@pytest.mark.parametrize("how", ["transposed", "sliced", "columns of a wider matrix"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_change_no_sum_s_terms(many, dtype, how):
    p = make_problem(45, 96, 67, 3, dtype=dtype)
    p.x, p.dy, p.weight = (strided(t, how) for t in (p.x, p.dy, p.weight))
    check(p, solve(p, "panels"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_the_weight_is_rounded_once(many, dtype, groups):
    """With x = I, y is W'^T; with dy = I, dx is W'."""
    p = make_problem(96, 96, 96, groups, dtype, bias=False, shift=False)
    p.x = p.dy = torch.eye(96, dtype=dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    v = p.scale_in.repeat_interleave(96 // groups, 0)[:, 0]
    scales = torch.addcmul(torch.ones((), dtype=wide), p.scale_out, v)
    rescaled = (p.weight.to(wide) * scales).to(dtype)
    got = solve(p, "panels")
    assert torch.equal(got.y, rescaled.mT)
    assert torch.equal(got.dx, rescaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_no_product_forms_u_v_or_sums_p_where_settings_let_it_round(monkeypatch, precision, dtype):
    p, seen, multiply = make_problem(33, 60, 70, 3, dtype, rank=5), set(), torch.Tensor.addmm_
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda sums, *a: (seen.add("sums of P"), multiply(sums, *a))[1])
    torch.set_float32_matmul_precision(precision)
    try:
        with mock.patch.object(torch, "baddbmm", wraps=torch.baddbmm) as u_v:
            results = [result for run in passes(p).values() for result in run()]
    finally:
        torch.set_float32_matmul_precision("highest")
        monkeypatch.undo()
    check(p, Answer(*results))
    rounds = precision == "medium" and dtype is torch.float32
    assert (u_v.call_count > 0, seen) == ((False, set()) if rounds else (True, {"sums of P"}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_blas_that_returns_float32_for_narrow_operands(many, monkeypatch, dtype):
    """As NVIDIA's: G is one product of operands that are not widened."""
    mm, asked = torch.mm, []

    def wide_mm(a, b, out_dtype=None, *, out):
        asked.append(out_dtype)
        return mm(a, b, out=out) if out_dtype is None else out.copy_(mm(a.to(out_dtype), b.to(out_dtype)))

    monkeypatch.setattr(panels, "_gives_float32", lambda device: True)
    monkeypatch.setattr(torch, "mm", wide_mm)
    p = make_problem(65, 130, 67, dtype=dtype)
    got = solve(p, "panels")
    monkeypatch.undo()
    check(p, got)
    assert asked.count(torch.float32) >= 2


def passes(p):
    scales = (p.weight, p.scale_out, p.scale_in)
    return {
        "forward": lambda: (panels.forward(p.x, *scales, p.bias, p.shift),),
        "grad_input": lambda: (panels.grad_input(p.dy, *scales),),
        "grad_scales": lambda: panels.grad_scales(p.dy, p.x, *scales, True),
    }


@pytest.mark.parametrize(
    ("pair", "shape", "rank"),
    list(zip(PAIRS, [(3072, 1024, 3), (1024, 3072, 1)] * 3, [1, 8, 1, 1, 8, 1], strict=True)),
    ids=str,
)
def test_no_pass_takes_more_than_2_mb(monkeypatch, pair, shape, rank):
    """Also for many tokens. Products into ``out`` are replaced, as oneDNN's take scratch of their own."""
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out: out)
    monkeypatch.setattr(torch, "addmm", lambda offset, a, b, *, out: out)
    n, k, groups = shape
    p = make_problem(1000, n, k, groups, *pair, rank=rank)
    vectors = 16 * rank * (n + groups * k)
    for name, run in passes(p).items():
        assert 2**20 < peak_extra_bytes(run) < 2 * 2**20 + vectors < n * k * p.x.itemsize / 2, name


def test_a_small_weight_is_not_formed_whole_either():
    """64 KB would fit a panel. At most half of it and half of G are formed, besides vectors."""
    p = make_problem(4, 128, 128)
    for name, run in passes(p).items():
        assert peak_extra_bytes(run) < 4 * 128 * 128 // 2 + 4096, name


@pytest.mark.parametrize("rank", [1, 8])
def test_nothing_is_allocated_for_a_panel(rank):
    """Nor for strides that no BLAS reads: x and dy are copied once."""
    counts = []
    for n in (2048, 8192):
        p = make_problem(4, n, 1024, rank=rank)
        p.x, p.dy = strided(p.x, "sliced"), strided(p.dy, "sliced")
        for run in passes(p).values():
            run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            for run in passes(p).values():
                run()
        events = record.profiler.kineto_results.events()
        counts.append(sum(e.name() == "[memory]" and e.nbytes() > 0 for e in events))
    assert counts[0] == counts[1]


def test_panels_cover_everything_fit_and_are_multiples_of_tiles_where_possible():
    for count in range(1, 700, 9):
        for most in (0, 1, 5, 16, 50, 127, 128, 300, 1000):
            for halve in (False, True):
                size = panels._size(count, most, halve)
                found = [i for panel in panels._panels(count, size) for i in range(count)[panel]]
                assert found == list(range(count))
                assert size <= max(most, 1)
                assert not halve or count == 1 or size < count
    assert panels._size(768, 597, False) == panels._size(768, 597, True) == 384
    assert panels._size(3072, 455, False) == 384
    assert panels._size(768, 113, False) == 112


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(gpu, dtype):
    for shape in [(394, 768, 768, 1), (197, 96, 131, 3), (64, 768, 3072, 1)]:
        check(p := make_problem(*shape, dtype, device=gpu), solve(p, "panels"))


@pytest.mark.gpu
def test_on_a_gpu_a_graph_holds_all_passes_and_little_memory(gpu):
    p = make_problem(512, 4096, 4096, dtype=torch.bfloat16, device=gpu)
    eager = solve(p, "panels")
    for name, run in passes(p).items():
        assert peak_extra_bytes(run) < 2 * 2**20, name
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(p, "panels")
    graph.replay()
    for name in RESULTS:
        assert torch.equal(getattr(captured, name), getattr(eager, name)), name
