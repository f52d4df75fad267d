"""The three kernels against float64, over shapes that are multiples of nothing."""

import itertools

import pytest
import torch

from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.config import Config, Device
from tests.oracle import Answer, Problem, check, differentiate, make_problem, strided

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
#: Of float16 the suite of all backends has every shape too; beside bfloat16 no kernel has code of its own for it.
DTYPES = [SINGLE, BF16, pytest.param(HALF, marks=pytest.mark.slow)]

# small tiles, so that small problems meet many tiles, several splits and every kind of edge
SMALL = Config(block_m=32, block_n=16, block_k=32, num_warps=4, num_stages=2)


def solve(p: Problem, config: Config | None, path: str | None, split_tokens: int = 64) -> Answer:
    chosen = {"config": config, "path": path}
    y = launch.forward(*p.forward_args, **chosen)
    dx = launch.grad_input(p.dy, p.weight, p.scale_out, p.scale_in, **chosen)
    if config is not None:
        chosen["split_tokens"] = split_tokens
    du, dv, df = launch.grad_scales(p.dy, p.x, p.weight, p.scale_out, p.scale_in, True, **chosen)
    return Answer(y, dx, du, dv, df)


SHAPES = [
    (1, 1, 1, 1),
    (1, 7, 5, 1),
    (33, 17, 19, 1),
    (70, 30, 72, 3),  # groups of 10 rows: every tile of a group is cut short
    (394, 32, 64, 1),  # many splits over the tokens
    # with the heuristic's tiles the suite of all backends has these too
    pytest.param(197, 10, 48, 1, marks=pytest.mark.slow),  # a classifier's few outputs
    pytest.param(197, 48, 40, 3, marks=pytest.mark.slow),  # groups of 16 rows: whole tiles
    pytest.param(65, 130, 67, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_shapes(triton_device, m, n, k, groups, dtype):
    check(p := make_problem(m, n, k, groups, dtype, device=triton_device), solve(p, SMALL, path="elements"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"),
    [(70, 40, 72, 1), (197, 48, 40, 3), (33, 64, 32, 2), (1, 16, 8, 1)],
)
def test_descriptor_path(triton_device, m, n, k, groups, dtype):
    if triton_device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors are for compute capability 9.0 and later")
    check(p := make_problem(m, n, k, groups, dtype, device=triton_device), solve(p, SMALL, path="boxes"))


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [pair for pair in itertools.product([SINGLE, HALF, BF16], repeat=2) if pair[0] != pair[1]],
    ids=str,
)
@pytest.mark.parametrize("path", [pytest.param("elements", marks=pytest.mark.slow), "boxes"])
def test_weight_of_another_dtype(triton_device, dtype, weight_dtype, path):
    p = make_problem(50, 48, 40, 3, dtype, weight_dtype, device=triton_device)
    check(p, solve(p, SMALL, path if triton_device == "cpu" else None))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"),
    [(33, 17, 19, 1), (70, 30, 72, 3), pytest.param(197, 48, 40, 3, marks=pytest.mark.slow), (70, 64, 64, 1)],
)
def test_the_form_for_mma_sync(monkeypatch, m, n, k, groups, dtype):
    """GPUs without wgmma keep W' on the right in grad_input: other code, the same results."""
    monkeypatch.setattr(launch, "INTERPRETED_DEVICE", Device((8, 0), 108, 166_912))
    assert not launch.INTERPRETED_DEVICE.has_wgmma
    check(p := make_problem(m, n, k, groups, dtype), solve(p, SMALL, "elements"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), [(70, 40, 72, 1), (33, 64, 32, 2)])
def test_the_form_for_compilers_that_are_not_trusted(monkeypatch, m, n, k, groups, dtype):
    """On Hopper W' then stands on the right, of tiles that come in boxes."""
    device = Device((9, 0), 132, 232_448, keeps_operands=False)
    monkeypatch.setattr(launch, "INTERPRETED_DEVICE", device)
    assert not device.weight_left
    check(p := make_problem(m, n, k, groups, dtype), solve(p, SMALL, "boxes"))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("path", ["elements", "boxes"])
def test_an_infinity_stays_out_of_padding_and_of_the_next_group(triton_device, path):
    """Tiles of 16 rows and 32 columns over groups of 40 rows and 72 columns: half of each last tile is not its own."""
    if triton_device == "cuda" and path == "boxes" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("descriptors are for compute capability 9.0 and later")
    p = make_problem(9, 80, 72, 2, device=triton_device)
    for name in ("x", "weight", "scale_out", "scale_in", "dy"):
        setattr(p, name, getattr(p, name).abs())
    p.dy[4, 40], p.x[5, 71] = float("inf"), float("inf")
    got, formula = solve(p, SMALL, path), differentiate(p, torch.float64)
    for name in ("y", "dx", "du", "dv", "df"):
        assert torch.equal(getattr(got, name).isposinf(), getattr(formula, name).isposinf()), name
        assert not getattr(got, name).isnan().any(), name
    assert formula.dv.isfinite().sum() == 71, "the first group's columns but for the last"


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded"])
def test_strides(triton_device, how):
    p = make_problem(45, 26, 35, device=triton_device)
    p.x, p.dy, p.weight = strided(p.x, how), strided(p.dy, how), strided(p.weight, how)
    if how == "expanded":
        assert p.dy.stride() == (0, 0)
    check(p, solve(p, SMALL, None))


@pytest.mark.parametrize("how", ["transposed", "expanded"])
def test_strided_activations_are_copied_first_where_the_model_says_that_it_pays(triton_device, how, monkeypatch):
    """What ``y.sum().backward()`` gives is one number, and would be loaded by the element."""
    p = make_problem(64, 32, 48, 2, HALF, device=triton_device)
    p.x, p.dy = strided(p.x, how), strided(p.dy, how)
    asked, loaded = [], []
    monkeypatch.setattr(launch, "_device", lambda _: Device((8, 0), 108, 166_912))
    monkeypatch.setattr(
        launch, "_constants", lambda *a, real=launch._constants: (loaded.append(a[1].is_contiguous()), real(*a))[1]
    )
    for pays in (False, True):
        monkeypatch.setattr(launch.configs, "copy_pays", lambda *a, pays=pays: (asked.append(a), pays)[1])
        check(p, solve(p, SMALL, None))
    assert loaded == [False] * 3 + [True] * 3
    # kernel, shape, groups, arithmetic, now, then, sizes, elements to be copied
    x, dy = 64 * 48, 64 * 32
    assert [(a[0], *a[5:8], a[-2]) for a in asked[3:]] == [
        ("forward", "half", "elements", "vectors", x),
        ("grad_input", "half", "elements", "vectors", dy),
        ("grad_scales", "half", "elements", "vectors", x + dy),
    ]


def test_what_no_copy_would_load_better_is_not_copied(triton_device, monkeypatch):
    monkeypatch.setattr(launch.configs, "copy_pays", lambda *_: pytest.fail("the rows of W are odd"))
    p = make_problem(64, 33, 47, dtype=HALF, device=triton_device)
    p.x, p.dy = strided(p.x, "transposed"), strided(p.dy, "transposed")
    check(p, solve(p, SMALL, None))


def test_offset_storage_is_not_taken_for_aligned(triton_device):
    """A view that starts 2 bytes into its storage cannot be loaded by the copy engine."""
    p = make_problem(40, 32, 32, dtype=HALF, device=triton_device)
    shifted = torch.empty(40 * 32 + 1, dtype=HALF, device=triton_device)[1:].view(40, 32)
    p.x = shifted.copy_(p.x)
    assert not launch._fits_boxes(p.x)
    assert not launch._fits_vectors(p.x)
    check(p, solve(p, SMALL, None))


def test_each_path_only_where_it_can_load(triton_device):
    x = torch.zeros(8, 32, dtype=HALF, device=triton_device)
    cases = {  # tensor: fits boxes, fits vectors
        "whole": (x, True, True),
        "left half": (x[:, :16], True, True),
        "a quarter": (x[:, :8], True, False),
        "transposed": (x.mT, False, False),
        "rows 62 bytes apart": (x[:, :31].contiguous(), False, False),
        "rows 48 bytes apart": (torch.zeros(8, 24, dtype=HALF, device=triton_device), True, False),
        "stride 0": (x[:1].expand(8, 32), False, True),
        "off by one element": (torch.zeros(257, dtype=HALF, device=triton_device)[1:].view(8, 32), False, False),
    }
    found = {name: (launch._fits_boxes(t), launch._fits_vectors(t)) for name, (t, *_) in cases.items()}
    assert found == {name: (boxes, vectors) for name, (_, boxes, vectors) in cases.items()}


@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_negative_powers_of_two_equal_a_prescaled_weight_bit_for_bit(triton_device, dtype):
    """1 + uv = -2 or -1/2 rounds nothing, so rescaling must change no bit of the product."""
    p = make_problem(50, 32, 48, 2, dtype, bias=False, shift=False, device=triton_device)
    p.scale_out = 1.0 - 0.5 * (torch.arange(32, device=triton_device)[:, None] % 2)
    p.scale_in = torch.full_like(p.scale_in, -3.0)
    scale = 1 + p.scale_out * p.scale_in[0, 0, 0]
    assert set(scale.flatten().tolist()) == {-2.0, -0.5}
    plain = make_problem(50, 32, 48, 2, dtype, bias=False, shift=False, device=triton_device)
    plain.weight = (plain.weight.float() * scale).to(dtype)
    plain.scale_out = torch.zeros_like(plain.scale_out)
    a, b = solve(p, SMALL, "elements"), solve(plain, SMALL, "elements")
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.dx, b.dx)


@pytest.mark.usefixtures("interpreted")
def test_the_order_of_programs_does_not_matter(monkeypatch):
    """Two programs that wrote one place differently would race on a GPU; run backwards, they would show here."""
    from triton.runtime.interpreter import interpreter_builder as builder

    p = make_problem(70, 30, 72, 3)  # tiles that are cut short by their group's end
    forwards = solve(p, SMALL, "elements")
    set_index, order = builder.set_grid_idx, []

    def backwards(x, y, z):
        order.append(x)
        set_index(builder.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    reversed_ = solve(p, SMALL, "elements")
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
    check(p := make_problem(m, n, k, groups, dtype, device=gpu), solve(p, None, None))


@pytest.mark.gpu
def test_tf32_follows_pytorchs_flag(gpu):
    p = make_problem(512, 256, 512, device=gpu)
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            check(p, solve(p, None, None))
            exact = p.x.double() @ p.weight.double().mT
            got = launch.forward(p.x, p.weight, 0 * p.scale_out, p.scale_in, None, None)
            errors[allowed] = float((got - exact).norm() / exact.norm())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-6 < 1e-5 < errors[True] < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["boxes", "elements"])
def test_offsets_beyond_int32(gpu, path):
    """M * N above 2**31 in y, in dy of both backward kernels, and M * K in x: rows need 64-bit offsets."""
    if path == "boxes" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the copy engine is for compute capability 9.0 and later")
    m, wide, narrow = 2**22 + 5, 520, 8
    small = make_problem(64, wide, narrow, dtype=BF16, device=gpu)
    x, dy = (torch.zeros(m, width, dtype=BF16, device=gpu) for width in (narrow, wide))
    x[-64:], dy[-64:] = small.x, small.dy
    large = Problem(x, *small.forward_args[1:], dy)
    got, expected = solve(large, None, path), solve(small, None, path)
    assert torch.equal(got.y[-64:], expected.y)
    assert torch.equal(got.dx[-64:], expected.dx)
    for name in ("du", "dv", "df"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-4)
    del large, dy, got
    flipped = make_problem(64, narrow, wide, dtype=BF16, device=gpu)
    x = torch.zeros(m, wide, dtype=BF16, device=gpu)
    x[-64:] = flipped.x
    y = launch.forward(x, *flipped.forward_args[1:], path=path)
    assert torch.equal(y[-64:], launch.forward(*flipped.forward_args, path=path))


def test_a_numpy_that_the_interpreter_does_not_take_is_said_in_one_sentence(monkeypatch):
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
