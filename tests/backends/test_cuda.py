"""The CUDA C++ library as built: no spill, no stack; and, on a GPU, real shapes and the Hopper path."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from rlrr_kernels.backends import choice, library
from tests.backends.test_numerics import RESULTS, solve
from tests.oracle import Answer, Problem, check, make_problem, require

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
BUILT = library.FOLDER / "librlrr_cuda.so"


def _cuobjdump() -> str:
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)
    if found is None:
        pytest.skip("no cuobjdump")
    return found


@pytest.fixture(scope="module")
def resources() -> dict[str, list[tuple[str, dict[str, int]]]]:
    """Architecture -> (kernel, what it uses), of the library that is installed."""
    if not BUILT.exists():
        pytest.skip("the CUDA library is not built")
    listed = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", BUILT], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[tuple[str, dict[str, int]]]] = {}
    arch = ""
    for line in listed.splitlines():
        if match := re.match(r"arch = (\S+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = match[1]
        elif "REG:" in line:
            found.setdefault(arch, []).append((name, {k: int(v) for k, v in re.findall(r"([A-Z]+):(\d+)", line)}))
    return found


def test_every_pass_dtype_and_tile_is_there(resources):
    """Six kinds of arithmetic and staging for two products, four for G, in two tiles each; and the sums."""
    for arch in ("sm_80", "sm_90"):
        if arch not in resources:
            pytest.skip(f"built without {arch}")
        names = [name for name, _ in resources[arch]]
        for kernel in ("forward_kernel", "grad_input_kernel", "grad_scales_kernel"):
            count = sum(kernel in name for name in names)
            # bf16 and fp16, each with W staged as it is and as float32, TF32 and plain float32; G never has W staged
            assert count >= (8 if kernel == "grad_scales_kernel" else 12), (kernel, count)
        # vectors and elements of three dtypes, in two files
        assert sum("add_splits_kernel" in name for name in names) >= 12


def test_no_kernel_spills_or_has_a_stack(resources):
    uses = [(arch, name, use) for arch, kernels in resources.items() for name, use in kernels]
    assert len(uses) > 30
    assert [(arch, name) for arch, name, use in uses if use["STACK"] or use["LOCAL"]] == []


def test_four_small_tiles_fit_a_multiprocessor_where_tensor_cores_multiply(resources):
    """Registers: 65536 for four blocks of 128 threads."""
    for arch in ("sm_80", "sm_90"):
        if arch not in resources:
            pytest.skip(f"built without {arch}")
        small = {
            name: use["REG"] for name, use in resources[arch] if "TileILi64ELi64E" in name and "PlainMath" not in name
        }
        assert len(small) == 5 + 5 + 3  # x and W of forward and grad_input, x of grad_scales
        assert {name: registers for name, registers in small.items() if registers > 128} == {}


def test_the_library_loads_where_there_is_no_gpu():
    if not BUILT.exists():
        pytest.skip("the CUDA library is not built")
    module = choice.load("cuda")
    assert not isinstance(module, str), module
    assert re.search(r"torch 2\.\d+ headers, .*CUDA \d+\.\d, compute capabilities \d\d", module.build())


def test_it_refuses_what_it_cannot_serve_and_says_what_it_can():
    module = choice.load("cuda")
    if isinstance(module, str):
        pytest.skip(module)
    x = torch.zeros(2, 2)
    assert module.unsupported(x, x) == "device cpu: it runs on NVIDIA GPUs"
    assert module.unsupported(x.double(), x.double()).endswith("it computes in float32, float16 and bfloat16")


@pytest.fixture
def calls(monkeypatch) -> list[tuple[object, ...]]:
    """What the library's ops are called with, in their place."""
    module, made = choice.load("cuda"), []
    if isinstance(module, str):
        pytest.skip(module)
    for name in ("_forward", "_grad_input", "_grad_scales"):
        monkeypatch.setattr(module, name, lambda *arguments: made.append(arguments))
    return made


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
def test_modes_are_passed_on(calls, monkeypatch, dtype, precision, hopper):
    """TF32 by PyTorch's setting and for float32 alone; the Hopper path by the module's switch."""
    module = choice.load("cuda")
    monkeypatch.setattr(module, "HOPPER", hopper)
    before = torch.backends.cuda.matmul.fp32_precision
    x = torch.zeros(2, 2, dtype=dtype)
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        module.forward(x, x, x, x, None, None)
        module.grad_input(x, x, x, x)
        module.grad_scales(x, x, x, x, x, True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert [arguments[-2:] for arguments in calls] == [(dtype is SINGLE and precision == "tf32", hopper)] * 3
    assert [len(arguments) for arguments in calls] == [8, 6, 8]


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), pytest.param("0", False, marks=pytest.mark.slow), ("1", True)]
)
def test_the_hopper_switch_is_read_at_import(value, expected):
    if isinstance(choice.load("cuda"), str):
        pytest.skip("the CUDA library is not built")
    environment = {k: v for k, v in os.environ.items() if k != "RLRR_CUDA_HOPPER"}
    if value is not None:
        environment["RLRR_CUDA_HOPPER"] = value
    code = "from rlrr_kernels.backends import cuda; print(cuda.HOPPER)"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the driver is right")
def test_it_says_what_is_wrong_with_the_driver():
    module = choice.load("cuda")
    if isinstance(module, str):
        pytest.skip(module)
    reason = torch.ops.rlrr_cuda.unusable(0)
    assert re.search(r"CUDA driver .*\(built with CUDA \d+\.\d for [\d a]+, the driver serves CUDA \d+\.\d\)", reason)


# the second and third are deep and of few tiles, so that blocks share their depth in one pass or the other
SHAPES = [
    (197, 768, 768, 1),
    (197, 768, 3072, 1),
    (197, 3072, 768, 1),
    (6304, 2304, 768, 3),
    (6304, 768, 3072, 1),
    (12608, 5120, 1280, 1),
    (12611, 771, 770, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES)
def test_vision_transformer_shapes(gpu, m, n, k, groups, dtype):
    require("cuda", dtype)
    check(p := make_problem(m, n, k, groups, dtype, device=gpu), solve(p, "cuda"))


# forward's depth split on any GPU of 40 multiprocessors or more, in vectors and in elements; then grad_input's
DEEP = [(16, 64, 4096, 1), (33, 66, 4111, 3), (16, 4096, 64, 1), (33, 4110, 70, 3)]
# 4 MB and more of grad_scales' partial sums: several slices, of rows or of whole groups
SLICED = [(64, 8192, 8192, 1), (64, 9216, 8192, 3), (40, 98304, 512, 12)]


def same(a: Answer, b: Answer) -> None:
    """Bit for bit."""
    for name in RESULTS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, HALF, BF16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), [*DEEP, *SLICED, SHAPES[1], SHAPES[-1]])
def test_depths_and_slices_that_several_launches_share(gpu, monkeypatch, m, n, k, groups, dtype):
    """Held to the yardstick, and two runs to each other."""
    require("cuda", dtype)
    monkeypatch.setattr(choice.load("cuda"), "HOPPER", False)
    check(p := make_problem(m, n, k, groups, dtype, device=gpu), got := solve(p, "cuda"))
    same(got, solve(p, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [SINGLE, BF16], ids=str)
@pytest.mark.parametrize(("m", "n", "k", "groups"), [*DEEP, SLICED[0]])
def test_a_captured_graph_computes_from_what_its_inputs_hold_by_then(gpu, m, n, k, groups, dtype):
    """Workspaces are the graph's own, and stay so while other work takes memory between its runs."""
    require("cuda", dtype)
    p = make_problem(m, n, k, groups, dtype, device=gpu)
    others = [make_problem(m, n, k, groups, dtype, device=gpu, seed=seed) for seed in (1, 2)]
    expected = [solve(other, "cuda") for other in others]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = solve(p, "cuda")
    for other, answer in zip(others, expected, strict=True):
        for field in dataclasses.fields(Problem):
            getattr(p, field.name).copy_(getattr(other, field.name))
        for name in RESULTS:
            getattr(got, name).fill_(float("nan"))
        graph.replay()
        same(got, answer)
        torch.full((2**22,), float("nan"), device=gpu)


@pytest.fixture
def hopper(gpu, monkeypatch):
    """The experimental path, switched on; skips on other GPUs."""
    require("cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(choice.load("cuda"), "HOPPER", True)
    return gpu


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "groups"), [*SHAPES[:-1], (1, 8, 8, 1), (300, 192, 136, 3), (257, 520, 264, 1), (70, 64, 72, 1)]
)
def test_hopper_path(hopper, m, n, k, groups, dtype):
    p = make_problem(m, n, k, groups, dtype, device=hopper)
    got = solve(p, "cuda")
    check(p, got)
    same(got, solve(p, "cuda"))


@pytest.mark.gpu
def test_tf32_follows_pytorchs_flag(gpu):
    require("cuda")
    p = make_problem(512, 256, 512, device=gpu)
    p.scale_out.zero_()
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            check(p, solve(p, "cuda"))
            exact = p.x.double() @ p.weight.double().mT + p.bias.double() + p.shift.double()
            errors[allowed] = float((solve(p, "cuda").y - exact).norm() / exact.norm())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-6 < 1e-5 < errors[True] < 1e-3


@pytest.mark.gpu
def test_offsets_beyond_int32(gpu):
    """M * N above 2**31 in y and dy: rows need 64-bit offsets."""
    require("cuda")
    m, wide, narrow = 2**22 + 5, 520, 8
    small = make_problem(64, wide, narrow, dtype=BF16, device=gpu)
    x, dy = (torch.zeros(m, width, dtype=BF16, device=gpu) for width in (narrow, wide))
    x[-64:], dy[-64:] = small.x, small.dy
    got, expected = solve(Problem(x, *small.forward_args[1:], dy), "cuda"), solve(small, "cuda")
    assert torch.equal(got.y[-64:], expected.y)
    assert torch.equal(got.dx[-64:], expected.dx)
    for name in ("du", "dv", "df"):
        assert torch.allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_hopper_path_on_a_thread_that_has_not_used_the_gpu(hopper):
    """Tensor maps are encoded by the driver, which asks for a context: autograd's threads may have none."""
    p = make_problem(300, 192, 136, dtype=BF16, device=hopper)
    expected, got = solve(p, "cuda"), []
    thread = threading.Thread(target=lambda: got.append(solve(p, "cuda")))
    thread.start()
    thread.join()
    assert torch.equal(got[0].dx, expected.dx)


@pytest.mark.gpu
def test_an_error_is_not_reported_twice(gpu):
    """The runtime keeps a failed call's error, and a launch that went well would report it."""
    require("cuda")
    p = make_problem(20, 16, 16, device=gpu)
    assert "invalid device ordinal" in torch.ops.rlrr_cuda.unusable(torch.cuda.device_count())
    check(p, solve(p, "cuda"))


@pytest.mark.gpu
def test_asking_about_a_device_leaves_the_current_one_alone(gpu):
    require("cuda")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for current, other in ((0, 1), (1, 0)):
        with torch.cuda.device(current):
            for device in (current, other):
                torch.zeros(1, device=f"cuda:{device}")  # a context on both
            assert torch.ops.rlrr_cuda.unusable(other) == ""
            assert torch.cuda.current_device() == current
            assert torch.zeros(1, device="cuda").get_device() == current


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k", "groups"), [(256, 128, 128, 1), *DEEP, SLICED[0]])
def test_it_follows_the_current_stream(gpu, m, n, k, groups):
    """Enqueued on a side stream behind a long wait, each of its launches must wait too."""
    require("cuda")
    p = make_problem(m, n, k, groups, BF16, device=gpu)
    expected = solve(p, "cuda")
    x, dy = p.x, p.dy
    p.x, p.dy = torch.zeros_like(x), torch.zeros_like(dy)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        p.x.copy_(x)
        p.dy.copy_(dy)
        got = solve(p, "cuda")
    stream.synchronize()
    same(got, expected)
