"""The yardstick of tests, ``check`` and ``rlrr-tune``: the plain formula passes, and small errors do not."""

from __future__ import annotations

import pytest
import torch

from rlrr_kernels.backends import reference
from rlrr_kernels.backends.problem import Problem as Task
from rlrr_kernels.check import yardstick
from rlrr_kernels.tune.candidates import make_tensors
from tests.oracle import Problem, differentiate

KERNELS = ("forward", "grad_input", "grad_scales")
SMALL = (100, 48, 64, 3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def a_task(kernel, dtype=torch.float32, shape=SMALL):
    task = Task(kernel, *shape, dtype, dtype)
    return task, make_tensors(task, 1, torch.device("cpu"))[0]


def expected(task, t):
    return yardstick.expected(task.kernel, t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift, t.dy)


def misfit(got, wanted):
    judgement = yardstick.judge(got, wanted)
    assert (judgement.ratio > 1) == (judgement.reason is not None)
    return judgement.reason


def served(kernel, t):
    """Return the results of the reference backend."""
    if kernel == "forward":
        return (reference.forward(t.x, t.weight, t.scale_out, t.scale_in, t.bias, t.shift),)
    if kernel == "grad_input":
        return (reference.grad_input(t.dy, t.weight, t.scale_out, t.scale_in),)
    return reference.grad_scales(t.dy, t.x, t.weight, t.scale_out, t.scale_in, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_right_result_passes_and_one_wrong_element_does_not(kernel, dtype):
    task, tensors = a_task(kernel, dtype, (1000, 96, 128, 3))
    wanted = expected(task, tensors)
    got = served(kernel, tensors)
    assert misfit(got, wanted) is None
    for i, (value, want) in enumerate(zip(got, wanted, strict=True)):
        wrong = [one.clone() for one in got]
        typical = value.float().std()
        wrong[i].view(-1)[value.numel() // 2] += typical.to(value.dtype) / 4
        assert misfit(wrong, wanted).startswith(f"{want.name}: "), want.name


def test_what_is_expected_is_the_formula_and_its_gradients(monkeypatch):
    monkeypatch.setattr(yardstick, "_CHUNK", 33)  # 100 tokens in four uneven parts
    for kernel in KERNELS:
        task, t = a_task(kernel)
        m, (n, k) = task.m, t.weight.shape
        problem = Problem(
            t.x if len(t.x) else torch.zeros(m, k),
            t.weight,
            t.scale_out,
            t.scale_in,
            t.bias,
            t.shift,
            t.dy if len(t.dy) else torch.zeros(m, n),
        )
        answer = differentiate(problem, torch.float64)
        exact = {want.name: want.exact for want in expected(task, t)}
        for name in exact:
            torch.testing.assert_close(exact[name], getattr(answer, name), rtol=1e-12, atol=1e-12)
    assert set(exact) == {"du", "dv", "df"}
