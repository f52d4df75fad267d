"""The C++ CPU library: every instruction set, shapes that cross its blocks, memory, and its stable ABI."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from benchmarks import results
from benchmarks.implementations import call, make_inputs
from benchmarks.measures import peak_extra_bytes
from rlrr_kernels.backends import library
from tests.backends.test_numerics import RESULTS, solve
from tests.oracle import check, make_problem, require, strided
from tests.reliability.properties.solvers import own_instructions
from tests.reliability.soak import LEVELS


@pytest.fixture(autouse=True)
def _built():
    require("cpu")


# M, N, K, groups: across tiles of 8 x 48 (6 x 16 with AVX2, 32 x 32 x 32 with AMX), cells of G of 192 rows,
# blocks of 200 units of tokens, parts of 768 rows and chunks of 768 units of a sum
LARGE = [
    (1, 200, 300, 1),
    (769, 100, 97, 1),
    (1100, 96, 130, 3),
    (600, 300, 777, 2),
    (64, 3072, 768, 3),
    (64, 768, 3072, 1),
    (6304, 1536, 48, 1),  # thousands of partial sums
    (300, 500, 8, 500),  # a group a row: more partial sums than scratch for anything else
    (24, 40, 5000, 1),
    (24, 5000, 40, 1),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize(("m", "n", "k", "groups"), LARGE)
def test_shapes_across_blocks(m, n, k, groups, dtype):
    check(p := make_problem(m, n, k, groups, dtype), solve(p, "cpu"))


# M, N, K, groups, rank: besides the above across slabs of 64 or 96 columns, strips of 32 or 24, ranges of 384 rows
# or columns, each with sums of its own; blocks of 4 or 8 and vectors of 8 or 16 ranks
RANKS = [
    (1, 7, 5, 1, 2),
    (300, 70, 1000, 1, 8),
    (450, 800, 50, 1, 17),
    (500, 800, 810, 1, 9),  # several ranges of both
    (120, 500, 400, 4, 3),  # groups that end within a block of rows
    (40, 12, 30, 12, 128),
    (70, 33, 97, 3, 32),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("case", RANKS, ids=str)
def test_ranks_across_blocks(case, dtype):
    *shape, rank = case
    check(p := make_problem(*shape, dtype, rank=rank), solve(p, "cpu"))


@pytest.mark.parametrize("how", ["transposed", "sliced", "columns of a wider matrix", "off by one element"])
@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_strides_at_a_rank(pair, how):
    p = make_problem(97, 90, 75, 3, *pair, rank=17)
    p.x, p.dy, p.weight = (strided(t, how) for t in (p.x, p.dy, p.weight))
    check(p, solve(p, "cpu"))


CODE = """
import torch
from rlrr_kernels.backends import cpu
from tests.backends.test_numerics import solve
from tests.oracle import check, make_problem
capability = {capability!r}
assert cpu.build().endswith(capability), cpu.build()
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for shape in [(1, 7, 5, 1), (70, 30, 72, 3), (600, 130, 67, 1), (394, 96, 50, 2)]:
        check(p := make_problem(*shape, dtype), solve(p, "cpu"))
    check(p := make_problem(24, 40, 1700, 1, dtype), solve(p, "cpu"))  # sums of several chunks
for pair in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
    check(p := make_problem(70, 30, 72, 3, *pair), solve(p, "cpu"))
    p.x, p.weight, p.dy = (t.mT.contiguous().mT for t in (p.x, p.weight, p.dy))
    check(p, solve(p, "cpu"))
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for *shape, rank in [(1, 7, 5, 1, 2), (450, 800, 50, 1, 17), (70, 33, 97, 3, 32), (90, 40, 1700, 2, 128)]:
        check(p := make_problem(*shape, dtype, rank=rank), solve(p, "cpu"))
for pair in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
    p = make_problem(97, 90, 75, 3, *pair, rank=9)
    p.x, p.weight, p.dy = (t.mT.contiguous().mT for t in (p.x, p.weight, p.dy))
    check(p, solve(p, "cpu"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", LEVELS)
def test_every_lower_capability(capability):
    """The code for other machines: read once, so in a process of its own."""
    here = own_instructions()
    if LEVELS.index(capability) > LEVELS.index(here):
        pytest.skip(f"this CPU, or RLRR_CPU_CAPABILITY, goes as far as {here}")
    environment = os.environ | {"RLRR_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", CODE.format(capability=capability)], check=True, env=environment)


@pytest.mark.slow
def test_an_unknown_capability_is_refused():
    environment = os.environ | {"RLRR_CPU_CAPABILITY": "avx1024"}
    code = "import rlrr_kernels.backends.cpu"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "RLRR_CPU_CAPABILITY: expected one of baseline, avx2, avx512, avx512_bf16, amx, got 'avx1024'" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [(600, 300, 200, 3, 1), (600, 900, 800, 1, 5)], ids=str)
def test_the_gradients_of_the_scales_do_not_depend_on_the_number_of_threads(case, dtype):
    *shape, rank = case
    p = make_problem(*shape, dtype, rank=rank)
    threads, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(solve(p, "cpu"))
    finally:
        torch.set_num_threads(threads)
    # with float64 the product itself is BLAS's, which promises nothing of the kind
    for name in RESULTS if dtype is not torch.float64 else ("df",):
        for other in answers[1:]:
            assert torch.equal(getattr(answers[0], name), getattr(other, name)), name


def test_it_rescales_as_the_reference_does_bit_for_bit():
    """W' has the reference's bits: with x = I, y is W'^T itself, and with dy = I, dx is W'."""
    p = make_problem(40, 40, 40, 2, bias=False, shift=False)
    p.x = p.dy = torch.eye(40)
    ours, plain = solve(p, "cpu"), solve(p, "reference")
    assert torch.equal(ours.y, plain.y)
    assert torch.equal(ours.dx, plain.dx)


@pytest.fixture
def two_threads():
    """Scratch grows with the threads that a product repays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(768, 768), (768, 3072)])
@pytest.mark.parametrize("m", [197, pytest.param(1024, marks=pytest.mark.slow)])
def test_extra_memory_is_under_a_twentieth_of_the_formulas(m, n, k, dtype, two_threads):
    inputs = make_inputs(m, n, k, 1, dtype, "cpu")
    formula, ours = (peak_extra_bytes(call(name, "both", inputs).run) for name in ("formula", "rlrr_kernels"))
    assert formula > 2.9 * 4 * n * k  # three copies of W
    assert ours < 0.05 * formula


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize(("n", "k"), [(768, 768), (768, 3072)])
@pytest.mark.parametrize("m", [197, pytest.param(1024, marks=pytest.mark.slow)])
def test_extra_memory_of_a_rank_is_under_a_tenth_of_hira(m, n, k, rank, dtype, two_threads):
    """PEFT's HiRA holds W * (u v), its factors and x (W * (u v))^T."""
    pytest.importorskip("peft")
    inputs = make_inputs(m, n, k, 1, dtype, "cpu", rank=rank)
    hira, ours = results.HIRAS[rank], results.OURS
    theirs, extra = (peak_extra_bytes(call(name, "both", inputs).run) for name in (hira, ours))
    assert theirs > 1.9 * dtype.itemsize * n * k
    from rlrr_kernels.backends import cpu

    # without AMX bfloat16 takes more: 0.14 at most, for one image at rank 32 with AVX-512 alone
    more = dtype is torch.bfloat16 and not cpu.build().endswith("amx")
    assert extra < (0.15 if more else 0.1) * theirs


def test_scratch_does_not_grow_with_the_weight(two_threads):
    extra = []
    for size in (2048, 4096):
        p = make_problem(4, size, size)
        extra.append(peak_extra_bytes(lambda p=p: tuple(vars(solve(p, "cpu")).values())))
    # du and dv have a sum for each 192 rows, and each 144 columns, of W
    sums = 8 * 4096 * (4096 // 192 + 4096 // 144 + 2)
    assert max(extra) <= (2 << 20) + sums
    assert max(extra) < 4 * 4096 * 4096 / 16


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_the_library_needs_nothing_of_torch_but_its_stable_c_interface(name):
    path = library.FOLDER / f"librlrr_{name}.so"
    if not path.exists() or shutil.which("nm") is None:
        pytest.skip("no such library here, or no nm")
    listed = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1].partition("@")[0] for line in listed.splitlines()]
    ours = [s for s in symbols if re.match(r"(aoti_torch|torch)_", s)]
    assert "torch_call_dispatcher" in ours or name == "cuda"
    assert len(ours) > 10
    # C++ names of torch are mangled ones with its namespaces in them; Python's begin with Py
    assert [s for s in symbols if re.match(r"_?Py[A-Z_]", s) or re.search(r"N?K?\d*(c10|2at|5torch)", s)] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_begin_between_pairs(dtype):
    """Even sizes and strides, so that rows are read in place, from a base that no pair of bfloat16 is aligned to."""
    p = make_problem(40, 64, 50, dtype=dtype)
    for name in ("x", "dy", "weight"):
        t = getattr(p, name)
        wide = torch.full((t.shape[0], t.shape[1] + 2), float("nan"), dtype=dtype)
        setattr(p, name, wide[:, 1:-1].copy_(t))
    assert p.x.data_ptr() % 4 == dtype.itemsize % 4
    check(p, solve(p, "cpu"))
