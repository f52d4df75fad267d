"""Every rival computes the same function and gradients: being faster than a wrong one shows nothing."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from benchmarks import implementations, results
from benchmarks.implementations import Inputs, call
from benchmarks.measures import saved_for_backward
from benchmarks.timing import Unavailable
from rlrr_kernels import backend_for
from rlrr_kernels.backends import reference
from tests.oracle import Answer, Problem, assert_close, check, differentiate, make_problem

COMPILED = (results.FORMULA_COMPILED, results.RECOMPUTE_COMPILED, results.FORMULA_MAX)
ON_CPU = [name for name in implementations.names("both", "cpu", True) if name not in results.OTHER_FUNCTIONS]
EAGER = [name for name in ON_CPU if name not in COMPILED]
#: Compiling takes ten seconds each.
SAME_FUNCTION = [pytest.param(name, marks=[pytest.mark.slow] if name in COMPILED else []) for name in ON_CPU]


def inputs_of(p: Problem) -> Inputs:
    fields = {field.name: getattr(p, field.name).clone() for field in dataclasses.fields(Inputs)}
    inputs = Inputs(**fields)
    for t in inputs.trained:
        t.requires_grad_()
    return inputs


def run(name: str, direction: str, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    with implementations.context(name)():
        made = call(name, direction, inputs)
        if made.before is not None:
            made.before()
        return made.run()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "groups", "dtype"),
    [
        *((name, groups, dtype) for name in EAGER for groups in (1, 3) for dtype in (torch.float32, torch.float64)),
        *(pytest.param(name, 3, torch.float32, marks=pytest.mark.slow) for name in ON_CPU if name in COMPILED),
    ],
    ids=str,
)
def test_the_same_function_and_gradients_as_the_oracle(name, groups, dtype):
    p = make_problem(40, 24, 16, groups, dtype=dtype)
    y, dx, du, dv, df = run(name, "both", inputs_of(p))
    check(p, Answer(y, dx, du, dv, df))


RANKED = [name for name in implementations.names("both", "cpu", rank=8) if name not in results.OTHER_FUNCTIONS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in COMPILED else []) for n in RANKED])
def test_at_a_rank_above_1_the_same_function_and_gradients_too(name, dtype):
    p = make_problem(40, 24, 16, 3, dtype=dtype, rank=5)
    got = Answer(*run(name, "both", inputs_of(p)))
    if dtype is torch.float32:
        return check(p, got)
    exact = differentiate(p, torch.float64)
    plain = differentiate(p, dtype, keep=("weight", "scale_out", "scale_in", "bias", "shift"))
    for field in ("y", "dx", "du", "dv"):
        more = torch.finfo(dtype).eps / 4
        assert_close(field, getattr(got, field), getattr(plain, field), getattr(exact, field), more=more)


@pytest.mark.parametrize("name", SAME_FUNCTION)
def test_in_bfloat16_no_less_accurate_than_the_formula(name):
    """Rivals may round G and z to x's dtype, as the formula's own gradients do; ours may not, and does not."""
    p = make_problem(64, 48, 32, 3, dtype=torch.bfloat16)
    exact = differentiate(p, torch.float64)
    plain = differentiate(p, torch.bfloat16, keep=("weight", "scale_out", "scale_in", "bias", "shift"))
    got = Answer(*run(name, "both", inputs_of(p)))
    eps = torch.finfo(torch.bfloat16).eps
    for field in ("y", "dx", "du", "dv"):
        assert_close(field, getattr(got, field), getattr(plain, field), getattr(exact, field), more=eps / 4)
    assert_close("df", got.df, plain.df.float(), exact.df)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_formula_is_one_linear_with_both_biases_and_keeps_one_rescaled_weight(groups):
    """As published, bit for bit: y is rounded once, not once more for each bias added, and W' is kept in x's dtype."""
    p = make_problem(64, 48, 32, groups, dtype=torch.bfloat16)
    inputs = inputs_of(p)
    ones = (inputs.scale_out.view(groups, -1, 1) * inputs.scale_in).view(48, 32)
    weight = (p.weight.float() * (1 + ones)).bfloat16()
    offset = (p.bias + p.shift).bfloat16()
    made = implementations.bind(results.FORMULA, inputs)
    assert torch.equal(made.forward(), F.linear(p.x, weight, offset))
    saved, keeps_x = saved_for_backward(made.forward, inputs.x, (*made.trained, *made.frozen))
    assert (saved, keeps_x) == (2 * 48 * 32, True)


@pytest.mark.parametrize("name", [*SAME_FUNCTION, results.PLAIN, results.LORA, results.HIRA, results.THREE_OPS])
def test_the_parts_are_those_of_the_whole(name):
    if name in (results.LORA, results.HIRA):
        pytest.importorskip("peft")
    inputs = inputs_of(make_problem(20, 12, 10))
    torch.manual_seed(0)  # PEFT draws its adapters when the layer is made
    whole = run(name, "both", inputs)
    torch.manual_seed(0)
    (y,) = run(name, "forward", inputs)
    torch.manual_seed(0)
    gradients = run(name, "backward", inputs)
    torch.testing.assert_close((y.detach(), *gradients), whole)
    if name != results.THREE_OPS:
        assert y.requires_grad
        torch.manual_seed(0)
        (alone,) = run(name, "forward_no_grad", inputs)
        assert not alone.requires_grad
        torch.testing.assert_close(alone, y.detach())


def test_a_backward_uses_up_the_graph_of_its_own_forward():
    made = call(results.FORMULA, "backward", inputs_of(make_problem(4, 6, 8)))
    made.before()
    made.run()
    with pytest.raises(AssertionError):
        made.run()


def test_three_ops_and_the_gradients_of_the_scales_alone():
    p = make_problem(20, 12, 10, 2)
    inputs = inputs_of(p)
    check(p, Answer(*run(results.THREE_OPS, "both", inputs)))
    exact = differentiate(p, torch.float64)
    for got, want in zip(run(results.GRAD_SCALES, "grad_scales", inputs), (exact.du, exact.dv, exact.df), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_bare_products_are_the_three_of_the_layer():
    p = make_problem(20, 12, 10)
    inputs = inputs_of(p)
    want = p.x @ p.weight.T, p.dy @ p.weight, p.dy.T @ p.x
    assert torch.equal(run(results.PRODUCTS, "forward", inputs)[0], want[0])
    for direction, expected in (("both", want), ("backward", want[1:])):
        for got, value in zip(run(results.PRODUCTS, direction, inputs), expected, strict=True):
            assert torch.equal(got, value)
    assert torch.equal(run(results.BARE_GRAD, "grad_scales", inputs)[0], want[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pefts_layers_are_lora_and_hira_with_adapters_of_xs_dtype(dtype):
    pytest.importorskip("peft")
    p = make_problem(20, 12, 10, dtype=dtype)
    lora = implementations.bind(results.LORA, inputs_of(p))
    x, a, b = lora.trained
    assert {a.dtype, b.dtype} == {dtype}
    assert (a.shape, b.shape) == ((8, 10), (12, 8))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.2}
    want = F.linear(p.x, p.weight, p.bias) + p.x @ a.mT @ b.mT  # alpha = r by default
    torch.testing.assert_close(lora.forward(), want, **close)
    hira = implementations.bind(results.HIRA, inputs_of(p))
    x, v, u = hira.trained
    assert (v.shape, u.shape) == ((1, 10), (12, 1))
    want = reference.formula(x, p.weight, u, v.unsqueeze(0), p.bias)
    torch.testing.assert_close(hira.forward(), want, **close)
    eight = inputs_of(make_problem(20, 12, 10, dtype=dtype, rank=8))
    x, v, u = implementations.bind(results.HIRAS[8], eight).trained
    assert (v.shape, u.shape) == ((8, 10), (12, 8))
    with torch.no_grad():
        assert (hira.forward() - F.linear(x, p.weight, p.bias)).abs().max() > 0.1  # the adapter is not at its zeros


def test_without_peft_its_layers_are_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Unavailable, match="peft cannot be imported"):
        implementations.bind(results.LORA, inputs_of(make_problem(4, 6, 8)))
    monkeypatch.setitem(sys.modules, "peft", types.SimpleNamespace(__version__="0.1"))
    with pytest.raises(Unavailable, match=r"peft 0\.1 has no HiRA"):
        implementations.bind(results.HIRA, inputs_of(make_problem(4, 6, 8)))


def test_each_of_ours_runs_on_the_backend_in_its_name():
    x = torch.randn(4, 8)
    with implementations.context(results.CPU)():
        assert backend_for(x, x) == "cpu"
    assert implementations.served_by(results.CPU, x, x) == "cpu"
    assert implementations.served_by(results.FORMULA, x, x) is None
    with pytest.raises(Unavailable, match="backend 'cpu' cannot serve"):
        implementations.served_by(results.CPU, x.half(), x.half())


def test_the_hopper_variant_switches_the_hopper_path_on_and_off_again():
    cuda = pytest.importorskip("rlrr_kernels.backends.cuda", reason="no CUDA library here", exc_type=ImportError)
    before = cuda.HOPPER
    with implementations.context(results.CUDA_HOPPER)():
        assert cuda.HOPPER is True
    assert cuda.HOPPER is before
    with implementations.context(results.CUDA)():
        assert cuda.HOPPER is before


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 3])
def test_on_a_gpu_the_same_function_and_gradients_too(gpu, groups):
    p = make_problem(256, 192, 128, groups, dtype=torch.bfloat16, device=gpu)
    exact = differentiate(p, torch.float64)
    plain = differentiate(p, torch.bfloat16, keep=("weight", "scale_out", "scale_in", "bias", "shift"))
    inputs, tried = inputs_of(p), []
    for name in implementations.names("both", "cuda", True):
        if name in results.OTHER_FUNCTIONS:
            continue
        try:
            implementations.served_by(name, inputs.x, inputs.weight)
        except Unavailable:
            continue
        got = Answer(*run(name, "both", inputs))
        for field in ("y", "dx", "du", "dv"):
            close = getattr(got, field), getattr(plain, field), getattr(exact, field)
            assert_close(f"{name}: {field}", *close, more=torch.finfo(torch.bfloat16).eps / 4)
        tried.append(name)
    assert {results.OURS, results.FORMULA_MAX, results.RECOMPUTE, results.FACTORED} <= set(tried)


@pytest.mark.slow
def test_a_compiled_rival_never_falls_back_to_eager_in_silence():
    with torch._dynamo.config.patch(recompile_limit=1):
        run(results.FORMULA_COMPILED, "forward", inputs_of(make_problem(4, 6, 8)))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            run(results.FORMULA_COMPILED, "forward", inputs_of(make_problem(5, 6, 8)))
