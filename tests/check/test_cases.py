"""What ``check`` computes, and that it finds planted errors."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlrr_kernels.backends import choice, reference, triton
from rlrr_kernels.backends.problem import Problem
from rlrr_kernels.backends.triton import launch
from rlrr_kernels.backends.triton.choose import Device, choose
from rlrr_kernels.backends.verdicts import PASSES
from rlrr_kernels.check import cases
from rlrr_kernels.check.cases import Case
from tests.oracle import require

CPU = torch.device("cpu")
ODD = Case(37, 51, 45, 3, torch.float32)
BF16 = Case(37, 51, 45, 3, torch.bfloat16)
#: An A100 and an H100.
GPUS = Device((8, 0), 108, 166_912), Device((9, 0), 132, 232_448)


def module(**changes):
    """Return the reference as a backend, with some of its functions replaced."""
    return SimpleNamespace(**vars(reference) | {"unsupported_layer_norm": lambda x: None} | changes)


@pytest.mark.parametrize("which", PASSES)
def test_the_cpu_backend_is_right(which, monkeypatch):
    require("cpu")
    monkeypatch.setitem(cases.TOKENS, "cpu", 20)
    backend = cases.module_of("cpu", CPU)
    x = torch.empty(1, 1)
    chosen = [c for c in cases.cases(which, "cpu") if c.n * c.k < 2**20 and not backend.unsupported(x, x, c.rank)]
    report = cases.run(backend, which, CPU, chosen)
    assert report.reason is None
    assert 0 < report.ratio <= 1
    assert report.worst in chosen
    half = [case for case in chosen if case.dtype is torch.float16]
    assert report.tried == len(chosen) - len(half)
    assert "float16" in report.refusal


@pytest.mark.parametrize("case", [ODD, BF16, Case(5, 6, 48, 1, torch.bfloat16, torch.float32)], ids=str)
def test_layer_norms_plain_formula_and_its_kernels_are_right(case):
    for kernels in (module(), triton):
        if kernels is triton and not launch.interpreting():
            continue  # they run on the GPU there
        report = cases.run(kernels, "layer_norm", CPU, [case])
        assert (report.tried, report.reason) == (1, None)


@pytest.mark.parametrize("device", GPUS, ids=lambda device: f"sm_{device.capability[0]}0")
def test_on_gpus_sums_are_split_and_kernels_to_compile_are_few(device):
    split = set()
    for which in PASSES:
        compiled = set()
        for c in cases.cases(which, "cuda"):
            if c.dtype is not torch.bfloat16:
                continue
            weight_dtype, aligned = c.weight_dtype or c.dtype, c.k % 16 == 0 and c.n % 16 == 0
            chosen = choose(Problem(which, c.m, c.n, c.k, c.groups, c.dtype, weight_dtype), device, aligned)
            compiled.add((replace(chosen, splits=1), chosen.splits > 1, weight_dtype, c.groups))
            if chosen.splits > 1:
                split.add(which)
        assert len(compiled) <= 9
    assert split == set(PASSES)


def _nan(t):
    t.view(-1)[-1] = math.nan
    return t


def _last_column(found):
    found[1][..., -1] = 0
    return found


WRONG = {
    "a NaN": ("forward", lambda f: lambda *a: _nan(f(*a)), r"^bfloat16, M 37, N 51, K 45, groups 3: y: not finite"),
    "2% more": ("grad_input", lambda f: lambda *a: f(*a) * 1.02, r"^bfloat16, .*: dx: error 2.1e-02, allowed 5.1e-03"),
    "dv's last column": ("grad_scales", lambda f: lambda *a: _last_column(f(*a)), r"^bfloat16, .*: dv: error"),
    "one element of df": (
        "grad_shift",
        lambda f: lambda dy: f(dy).index_add(0, torch.tensor([3]), torch.tensor([1e-3])),
        r"^bfloat16, .*: df alone: error",
    ),
    "a narrow df": (
        "grad_shift",
        lambda f: lambda dy: f(dy).to(dy.dtype),
        r"df alone: torch.bfloat16 \[51\], expected",
    ),
    "y transposed": ("forward", lambda f: lambda *a: f(*a).T, r"y: torch.bfloat16 \[51, 37\], expected "),
    "an error": ("forward", lambda f: lambda *a: 1 / 0, r"^bfloat16, .*: ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_planted_fault_is_noticed(fault):
    name, change, words = WRONG[fault]
    which = "grad_scales" if name == "grad_shift" else name
    assert cases.run(module(), which, CPU, [BF16, ODD]).reason is None
    report = cases.run(module(**{name: change(getattr(reference, name))}), which, CPU, [BF16, ODD])
    assert report.tried == 1  # a GPU may do no more after it
    assert report.worst == BF16
    assert re.search(words, report.reason), report.reason
    assert report.ratio > 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("layer_norm", lambda y, mean, rstd: (y * 1.02, mean, rstd), "y: error 2.1e-02"),
        ("layer_norm_backward", lambda dx, ds, dt: (dx, ds, dt * 1.001), "dt: error 1.0e-03"),
    ],
)
def test_a_fault_planted_in_layer_norm_is_noticed(name, change, words):
    right = getattr(reference, name)
    report = cases.run(module(**{name: lambda *a: change(*right(*a))}), "layer_norm", CPU, [BF16])
    assert words in report.reason


@pytest.mark.parametrize("which", PASSES)
def test_bits_that_differ_between_two_runs_are_noticed(which):
    """By one unit in the last place of one element, which no yardstick would mind."""
    runs = []

    def sometimes(*arguments):
        found = getattr(reference, which)(*arguments)
        runs.append(found)
        last = found[-1] if isinstance(found, tuple) else found
        if len(runs) == 2:
            bits = last.view(-1).view(torch.int32)
            bits[-1] += 1
        return found

    report = cases.run(module(**{which: sometimes}), which, CPU, [ODD])
    assert report.reason == "float32, M 37, N 51, K 45, groups 3: a second run gave other bits"
    assert report.ratio <= 1
    zeros = torch.tensor([0.0, -0.0])
    assert cases._difference([zeros[:1]], [zeros[1:]]) is not None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_running_out_of_memory_is_no_finding(error):
    def no_room(*arguments):
        raise error

    with pytest.raises(torch.OutOfMemoryError, match=re.escape(str(error))):
        cases.run(module(forward=no_room), "forward", CPU, [ODD])


def test_the_hopper_kernels_are_not_those_of_a_library_built_without_them(monkeypatch):
    """It would run its plain kernels in their place."""
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for built, here in (("80 90", False), ("80 90a", True)):
        library = SimpleNamespace(build=lambda built=built: f"GCC, CUDA 13.0, compute capabilities {built}")
        monkeypatch.setitem(choice._loaded, "cuda", library)
        assert cases.module_of("cuda", gpu) is library
        found = cases.module_of("cuda-hopper", gpu)
        assert (found is library) if here else ("90a" in found)


def test_a_launch_is_reported_before_its_result_is_awaited():
    said = []

    def forward(*arguments):
        said.append("forward")
        return reference.forward(*arguments)

    cases.run(module(forward=forward), "forward", CPU, [ODD, BF16], lambda *told: said.append(told))
    one, two = ((("launched", case), "forward", ("done", case)) for case in (ODD, BF16))
    assert said == ["forward", *one, "forward", *two]
