"""``panels`` beyond the suite of all backends: what a panel is, higher ranks, memory."""

import pytest
import torch

from benchmarks.memory import peak_extra_bytes
from rlrr_kernels import reference
from rlrr_kernels.backends import panels
from tests.backends.test_numerics import solve
from tests.oracle import check, make_problem

SHAPES = [
    (64, 1536, 1024, 3),  # panels within each group
    (300, 500, 8, 500),  # a group a row: many groups in a panel
    (40, 2, 1000, 1),
    (40, 1000, 2, 1),
    (20, 12, 9000, 4),
    (2000, 700, 640, 1),  # 16-bit tokens are widened some at a time
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_shapes_across_panels(m, n, k, groups, dtype):
    check(p := make_problem(m, n, k, groups, dtype), solve(p, "panels"))


@pytest.mark.parametrize(("shape", "expected"), [((1, 10, 8), 2), ((4, 2, 8), 2), ((3, 700, 1024), 6), ((1, 1, 8), 1)])
def test_panels_are_few_and_none_is_the_whole_weight(shape, expected):
    """Each row once, in order, and within the scratch."""
    groups, rows, _ = shape
    weight = torch.arange(float(groups * rows)).view(groups, rows, 1).expand(shape)
    spans = list(panels._row_spans(weight, 4))
    assert len(spans) == expected
    seen = []
    for some, part, span in spans:
        panel = weight[some, part]
        assert panel.numel() * 4 <= panels.SCRATCH_BYTES
        assert panel[:, :, 0].flatten().tolist() == list(range(span.start, span.stop))
        seen += range(span.start, span.stop)
    assert seen == list(range(groups * rows))


@pytest.mark.parametrize("rank", [2, 5])
def test_any_rank(rank):
    """As the formula, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, w, u, v, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((9, 8), (6, 8), (6, rank), (3, rank, 8), (9, 6))
    )
    torch.testing.assert_close(panels.forward(x, w, u, v, None, None), reference.forward(x, w, u, v, None, None))
    torch.testing.assert_close(panels.grad_input(dy, w, u, v), reference.grad_input(dy, w, u, v))
    torch.testing.assert_close(panels.grad_scales(dy, x, w, u, v, True), reference.grad_scales(dy, x, w, u, v, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_extra_memory_stays_within_the_scratch(dtype):
    """At 4,096 x 2,048 W' has 16 to 64 MB; results, and sums over the width of W, are not counted as scratch."""
    m, n, k = 64, 4096, 2048
    p = make_problem(m, n, k, 2, dtype)
    scales = p.weight, p.scale_out, p.scale_in
    small = 64 * (n + k) * torch.float64.itemsize  # vectors, and results of one pass
    for run in (
        lambda: (panels.forward(p.x, *scales, p.bias, p.shift),),
        lambda: (panels.grad_input(p.dy, *scales),),
        lambda: panels.grad_scales(p.dy, p.x, *scales, True),
    ):
        assert peak_extra_bytes(run) <= panels.SCRATCH_BYTES + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_few_wide_operands_does_not_grow_with_the_tokens(dtype):
    """x and dy are read where they are, widened a part at a time."""
    extra = []
    for m in (4000, 16000):
        p = make_problem(m, 96, 512, 1, dtype)
        run = lambda p=p: panels.grad_scales(p.dy, p.x, p.weight, p.scale_out, p.scale_in, False)  # noqa: E731
        extra.append(peak_extra_bytes(run))
    assert extra[1] <= extra[0] + 2**16
