"""The three kernels with small tiles against float64, over shapes with every kind of edge."""

import itertools
from dataclasses import replace

import pytest
import torch

from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.choose import Choice
from tests.oracle import Answer, Problem, check, differentiate, make_problem, strided

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
#: The suite of all backends runs 16-bit dtypes over such shapes too.
DTYPES = [SINGLE, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (BF16, HALF))]

# small tiles, so that small problems have many tiles, several splits and every kind of edge
SMALL = Choice(block_m=32, block_n=16, block_k=32, num_warps=4, num_stages=2)


def solve(p: Problem, choice: Choice | None) -> Answer:
    """All passes with one choice (None: the launcher's), grad_scales with a split for each two steps of its sum."""
    y = launch.forward(*p.forward_args, choice=choice)
    dx = launch.grad_input(p.dy, p.weight, p.scale_out, p.scale_in, choice=choice)
    scales = choice and replace(choice, splits=-(-len(p.x) // (2 * choice.block_m)))
    return Answer(y, dx, *launch.grad_scales(p.dy, p.x, p.weight, p.scale_out, p.scale_in, True, choice=scales))


SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 5, 1),
    (33, 17, 19, 1),
    (70, 30, 72, 3),  # groups of 10 rows: every tile of a group is cut short
    (394, 32, 64, 1),  # many splits over the tokens, sums of whole steps
    # with the heuristic's tiles the suite of all backends has these too
    pytest.param(197, 10, 48, 1, marks=pytest.mark.slow),  # a classifier's few outputs
    pytest.param(197, 48, 40, 3, marks=pytest.mark.slow),  # groups of 16 rows: whole tiles
    pytest.param(65, 130, 67, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_shapes(triton_device, m, n, k, groups, dtype):
    check(p := make_problem(m, n, k, groups, dtype, device=triton_device), solve(p, SMALL))


#: M, N, K, groups, rank, dtype. Ranks up to 4 (8 in full float32) are formed in registers, larger ones in panels.
RANKS = [
    (5, 17, 40, 1, 2, HALF),
    (5, 10, 37, 2, 8, SINGLE),
    (5, 17, 40, 1, 17, SINGLE),
    (5, 10, 37, 2, 17, BF16),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (33, 34, 72, 2, 3, BF16),
            (33, 32, 64, 1, 5, HALF),
            (33, 34, 40, 2, 32, HALF),
            (9, 18, 40, 2, 128, BF16),
        )
    ),
]


@pytest.mark.parametrize(("m", "n", "k", "groups", "rank", "dtype"), RANKS, ids=str)
def test_ranks(triton_device, m, n, k, groups, rank, dtype):
    p = make_problem(m, n, k, groups, dtype, rank=rank, device=triton_device)
    check(p, solve(p, replace(SMALL, splits=2)))


@pytest.mark.parametrize(("groups", "count"), [(1, 4 + 4), (3, 3 * 2 + 4)])
def test_a_larger_rank_is_formed_in_panels_of_the_scratch(triton_device, monkeypatch, groups, count):
    """Those of forward are rows of one group, those of grad_input columns of all groups."""
    p = make_problem(7, 54, 64, groups, rank=9, device=triton_device)
    monkeypatch.setattr(launch.panels, "SCRATCH", 18 * 64 * 4)
    monkeypatch.setattr(launch, "LEAST", 1)
    formed, start = [], launch.start

    def counted(kernel, grid, operands, *rest):
        if kernel is launch.panel_kernel:
            formed.append(operands[3].nbytes)
        start(kernel, grid, operands, *rest)

    monkeypatch.setattr(launch, "start", counted)
    made = launch.forward(*p.forward_args), launch.grad_input(p.dy, *p.forward_args[1:4])
    assert len(formed) == count
    assert max(formed) <= launch.panels.SCRATCH
    check(p, solve(p, SMALL))
    assert torch.equal(made[0], solve(p, SMALL).y)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [pair for pair in itertools.product([SINGLE, HALF, BF16], repeat=2) if pair[0] != pair[1]],
    ids=str,
)
def test_weight_of_another_dtype(triton_device, dtype, weight_dtype):
    p = make_problem(50, 48, 40, 3, dtype, weight_dtype, device=triton_device)
    check(p, solve(p, SMALL))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_an_infinity_stays_out_of_padding_and_of_the_next_group(triton_device):
    """With tiles of 16 x 32 and groups of 40 x 72, half of each last tile lies outside its group."""
    p = make_problem(9, 80, 72, 2, device=triton_device)
    for name in ("x", "weight", "scale_out", "scale_in", "dy"):
        setattr(p, name, getattr(p, name).abs())
    p.dy[4, 40], p.x[5, 71] = float("inf"), float("inf")
    got, formula = solve(p, SMALL), differentiate(p, torch.float64)
    for name in ("y", "dx", "du", "dv", "df"):
        assert torch.equal(getattr(got, name).isposinf(), getattr(formula, name).isposinf()), name
        assert not getattr(got, name).isnan().any(), name
    assert formula.dv.isfinite().sum() == 71, "the first group's columns but for the last"


@pytest.mark.parametrize("how", ["transposed", "expanded", "shifted"])
def test_activations_are_copied_if_their_layout_alone_prevents_vector_loads(triton_device, how, monkeypatch):
    """The gradient of ``y.sum()`` is one expanded number, which every tile would load one element at a time."""
    loaded = []
    real = launch.start
    monkeypatch.setattr(launch, "start", lambda kernel, *a: (loaded.append((kernel, a[1][:2])), real(kernel, *a)))
    for n, k, copied in ((32, 48, True), (33, 48, True), (32, 47, False)):
        p = make_problem(64, n, k, dtype=HALF, device=triton_device)
        p.x, p.dy = (_shifted(t) if how == "shifted" else strided(t, how) for t in (p.x, p.dy))
        loaded.clear()
        check(p, solve(p, SMALL))
        of = {kernel.__name__: operands for kernel, operands in loaded}
        assert (of["forward_kernel"][0] is not p.x) is copied, "the rows of W are odd where k is"
        whole = copied and n % 16 == 0
        assert (of["grad_input_kernel"][0] is not p.dy) is whole
        assert [new is not t for new, t in zip(of["grad_scales_kernel"], (p.dy, p.x), strict=True)] == [whole] * 2


def _shifted(t):
    """A copy that begins one element after its storage does."""
    return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)


def test_which_rows_count_as_aligned(triton_device):
    x = torch.zeros(8, 32, dtype=HALF, device=triton_device)
    cases = {
        "whole": (x, True),
        "left half": (x[:, :16], True),
        "a quarter": (x[:, :8], False),
        "transposed": (x.mT, False),
        "rows 62 bytes apart": (x[:, :31].contiguous(), False),
        "rows 48 bytes apart": (torch.zeros(8, 24, dtype=HALF, device=triton_device), False),
        "stride 0": (x[:1].expand(8, 32), True),
        "off by one element": (_shifted(x), False),
    }
    assert {name: launch._aligned(t) for name, (t, _) in cases.items()} == {n: found for n, (_, found) in cases.items()}


@pytest.mark.usefixtures("interpreted")
def test_the_order_of_programs_does_not_matter(monkeypatch):
    """Two programs that write different values to one place would race on a GPU; the reverse order shows it here."""
    from triton.runtime.interpreter import interpreter_builder as builder

    p = make_problem(40, 30, 72, 3)  # tiles that are cut short by their group's end
    forwards = solve(p, SMALL)
    set_index, order = builder.set_grid_idx, []

    def backwards(x, y, z):
        order.append(x)
        set_index(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    reversed_ = solve(p, SMALL)
    assert len(order) > 20
    for name in ("y", "dx", "du", "dv", "df"):
        assert torch.equal(getattr(forwards, name), getattr(reversed_, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"),
    [(197, 768, 768, 1), (6304, 2304, 768, 3), (6304, 768, 3072, 1), (12608, 5120, 1280, 1), (12611, 771, 770, 1)],
)
def test_vision_transformer_shapes(gpu, m, n, k, groups, dtype):
    check(p := make_problem(m, n, k, groups, dtype, device=gpu), solve(p, None))


@pytest.mark.gpu
def test_tf32_follows_pytorchs_flag(gpu):
    p = make_problem(512, 256, 512, device=gpu)
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            check(p, solve(p, None))
            exact = p.x.double() @ p.weight.double().mT
            got = launch.forward(p.x, p.weight, 0 * p.scale_out, p.scale_in, None, None)
            errors[allowed] = float((got - exact).norm() / exact.norm())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-6 < 1e-5 < errors[True] < 1e-3


@pytest.mark.gpu
def test_offsets_beyond_int32(gpu):
    """With M * N above 2**31 in y and dy, and M * K in x, rows need 64-bit offsets."""
    m, wide, narrow = 2**22 + 5, 520, 8
    small = make_problem(64, wide, narrow, dtype=BF16, device=gpu)
    x, dy = (torch.zeros(m, width, dtype=BF16, device=gpu) for width in (narrow, wide))
    x[-64:], dy[-64:] = small.x, small.dy
    large = Problem(x, *small.forward_args[1:], dy)
    got, expected = solve(large, None), solve(small, None)
    assert torch.equal(got.y[-64:], expected.y)
    assert torch.equal(got.dx[-64:], expected.dx)
    for name in ("du", "dv", "df"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-4)
    del large, dy, got
    flipped = make_problem(64, narrow, wide, dtype=BF16, device=gpu)
    x = torch.zeros(m, wide, dtype=BF16, device=gpu)
    x[-64:] = flipped.x
    y = launch.forward(x, *flipped.forward_args[1:])
    assert torch.equal(y[-64:], launch.forward(*flipped.forward_args))


def test_a_numpy_that_the_interpreter_cannot_use_is_reported(monkeypatch):
    x = torch.zeros(1, 1)
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    found = {}
    for triton_version, numpy_version in (("3.6.0", "2.5.5"), ("3.6.0", "2.3.9"), ("3.7.1", "2.5.5")):
        monkeypatch.setattr(launch.triton, "__version__", triton_version)
        monkeypatch.setattr("numpy.__version__", numpy_version)
        launch.interpreter_misfit.cache_clear()
        found[triton_version, numpy_version] = launch.unsupported(x, x)
    launch.interpreter_misfit.cache_clear()
    assert found == {
        ("3.6.0", "2.5.5"): "TRITON_INTERPRET=1 with Triton 3.6.0 needs NumPy before 2.4, got 2.5.5",
        ("3.6.0", "2.3.9"): None,
        ("3.7.1", "2.5.5"): None,
    }
