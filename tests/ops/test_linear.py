"""rescaled_linear: gradients, work nobody needs, memory, autocast, and one clear error for bad input."""

import contextlib
import itertools
from collections.abc import Iterable
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlrr_kernels import rescaled_linear, use_backend
from rlrr_kernels.backends import reference
from rlrr_kernels.ops import linear
from tests.oracle import BACKENDS, Answer, check, device_of, make_problem, require


def _run(p, backend, x=None, dy=None):
    """Forward and backward through the autograd.Function, in the oracle's shapes."""
    x = (p.x if x is None else x).detach().clone().requires_grad_()
    dy = p.dy if dy is None else dy
    leaves = [t.clone().requires_grad_() for t in (p.scale_out, p.scale_in)]
    offsets = {k: t.clone().requires_grad_() for k in ("bias", "shift") if (t := getattr(p, k)) is not None}
    with use_backend(backend):
        y = rescaled_linear(x, p.weight, *leaves, **offsets)
        y.backward(dy)
    return y.detach(), x.grad, [t.grad for t in leaves], {k: t.grad for k, t in offsets.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("bias", "shift"), list(itertools.product([False, True], repeat=2)))
def test_gradcheck_in_float64(backend, groups, bias, shift):
    require(backend, torch.float64)
    p = make_problem(5, 6, 4, groups, torch.float64, bias=bias, shift=shift)
    inputs = [t if t is None else t.requires_grad_() for t in p.forward_args]
    with use_backend(backend):
        assert torch.autograd.gradcheck(rescaled_linear, tuple(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 4), (2, 2, 3, 2)], ids=str)
def test_inputs_of_one_to_four_dimensions(backend, dtype, shape):
    m = int(torch.Size(shape).numel())
    p = make_problem(m, 18, 20, 3, dtype, device=require(backend, dtype))
    y, dx, (du, dv), offsets = _run(p, backend, p.x.view(*shape, 20), p.dy.view(*shape, 18))
    assert y.shape == (*shape, 18)
    assert dx.shape == (*shape, 20)
    check(p, Answer(y.view(m, 18), dx.view(m, 20), du, dv, offsets["shift"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 20), (3, 0, 20)], ids=str)
def test_no_rows_at_all(backend, shape):
    device = require(backend)
    p = make_problem(4, 18, 20, 3, device=device)
    x, dy = torch.zeros(shape, device=device), torch.zeros(*shape[:-1], 18, device=device)
    y, dx, (du, dv), offsets = _run(p, backend, x, dy)
    assert y.shape == dy.shape
    assert dx.shape == x.shape
    for grad, like in ((du, p.scale_out), (dv, p.scale_in), (offsets["shift"], p.shift)):
        assert torch.equal(grad, torch.zeros_like(like))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_expanded_gradient(backend):
    """x transposed in memory, and the stride-0 gradient that ``.sum()`` sends back."""
    p = make_problem(12, 18, 20, device=require(backend))
    p.x = p.x.mT.contiguous().mT
    p.dy = torch.ones(1, 1, device=p.x.device).expand(12, 18)
    y, dx, (du, dv), offsets = _run(p, backend)
    check(p, Answer(y, dx, du, dv, offsets["shift"]))
    x = p.x.clone().requires_grad_()
    with use_backend(backend):
        rescaled_linear(x, p.weight, p.scale_out, p.scale_in, p.bias, p.shift).sum().backward()
    assert torch.equal(x.grad, dx)


@pytest.mark.parametrize(
    ("u_shape", "v_shape"), [((6,), (4,)), ((6, 1), (1, 4)), ((6,), (1, 1, 4)), ((6, 1), (4,))], ids=str
)
def test_scale_shapes_are_free_and_gradients_follow_them(u_shape, v_shape):
    p = make_problem(5, 6, 4)
    u, v = p.scale_out.view(u_shape).requires_grad_(), p.scale_in.view(v_shape).requires_grad_()
    y = rescaled_linear(p.x, p.weight, u, v)
    y.backward(p.dy)
    assert torch.equal(y, rescaled_linear(p.x, p.weight, p.scale_out, p.scale_in))
    assert u.grad.shape == u_shape
    assert v.grad.shape == v_shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_an_unfrozen_weight_and_bias_get_right_gradients(backend, groups):
    p = make_problem(9, 8, 12, groups, device=require(backend))
    weight, bias = p.weight.clone().requires_grad_(), p.bias.clone().requires_grad_()
    with use_backend(backend):
        got = torch.autograd.grad(
            rescaled_linear(p.x, weight, p.scale_out, p.scale_in, bias, p.shift), (weight, bias), p.dy
        )
    wide = [t.double() for t in p.forward_args]
    wide[1].requires_grad_()
    wide[4].requires_grad_()
    exact = torch.autograd.grad(reference.formula(*wide), (wide[1], wide[4]), p.dy.double())
    for name, g, e in zip(("weight", "bias"), got, exact, strict=True):
        assert torch.allclose(g.double(), e, rtol=1e-5, atol=1e-5), name


def test_gradients_arrive_in_each_tensors_own_dtype():
    p = make_problem(9, 8, 12, dtype=torch.bfloat16)
    tensors = [
        p.x,
        p.weight.to(torch.float16),
        p.scale_out.half(),
        p.scale_in.bfloat16(),
        p.bias.to(torch.float16),
        p.shift.float(),
    ]
    for t in tensors:
        t.requires_grad_()
    rescaled_linear(*tensors).backward(p.dy)
    assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]
    assert all(t.grad.abs().sum() > 0 for t in tensors)


NAMES = ("x", "weight", "scale_out", "scale_in", "bias", "shift")


@pytest.mark.parametrize(
    ("needs", "calls", "keeps_x"),
    [
        ((), ["forward"], False),
        (("x",), ["forward", "grad_input"], False),
        (("shift",), ["forward"], False),
        (("x", "shift"), ["forward", "grad_input"], False),
        (("scale_out",), ["forward", "grad_scales"], True),
        (("scale_in", "shift"), ["forward", "grad_scales"], True),
        (("x", "scale_out", "scale_in", "shift"), ["forward", "grad_input", "grad_scales"], True),
        (("weight",), ["forward"], True),
    ],
    ids=str,
)
def test_nothing_is_computed_or_kept_that_nobody_needs(needs, calls, keeps_x):
    p = make_problem(5, 6, 4)
    inputs = dict(zip(NAMES, (t.clone() for t in p.forward_args), strict=True))
    for name in needs:
        inputs[name].requires_grad_()
    kept: list[torch.Tensor] = []
    done: list[str] = []

    backend = linear._backend("forward", p.x, p.weight, p.scale_in)

    def spy(name):
        op = getattr(backend, name)
        return lambda *args: (done.append(name), op(*args))[1]

    with contextlib.ExitStack() as stack:
        for name in ("forward", "grad_input", "grad_scales"):
            stack.enter_context(mock.patch.object(backend, name, spy(name)))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t))
        y = rescaled_linear(**inputs)
        if needs:
            y.backward(p.dy)
    assert done == calls
    assert any(t is inputs["x"] or t.data_ptr() == inputs["x"].data_ptr() for t in kept) == keeps_x
    assert [n for n in NAMES if inputs[n].grad is not None] == [n for n in NAMES if n in needs]


def test_df_is_not_computed_where_neither_bias_nor_shift_needs_it():
    p = make_problem(5, 6, 4)
    u = p.scale_out.clone().requires_grad_()
    asked = []
    backend = linear._backend("forward", p.x, p.weight, p.scale_in)
    op = backend.grad_scales
    with mock.patch.object(backend, "grad_scales", lambda *a: (asked.append(a[-1]), op(*a))[1]):
        rescaled_linear(p.x, p.weight, u, p.scale_in, p.bias, p.shift).backward(p.dy)
    assert asked == [False]


class Allocations(TorchDispatchMode):
    """Bytes of every storage that is not one of ``known``, inside the package's ops too."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.known = {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlrr":
            with self:  # look inside the op
                return getattr(linear, "_" + func._schema.name.partition("::")[2])(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(t.untyped_storage().nbytes())
        return result


def _largest_allocation(backend: str, groups: int) -> tuple[int, int, list[int]]:
    """(bytes of the largest new tensor, of y or dx, elements of own tensors saved for backward)."""
    m, n, k = 8, 96, 80  # M is small: anything of N * K stands out
    p = make_problem(m, n, k, groups, device=device_of(backend))
    leaves = [t.clone().requires_grad_() for t in (p.x, p.scale_out, p.scale_in, p.bias, p.shift)]
    x, u, v, b, f = leaves
    saved: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with use_backend(backend), Allocations([*leaves, p.weight, p.dy]) as watch, hooks:
        rescaled_linear(x, p.weight, u, v, b, f).backward(p.dy)
    own = {t.data_ptr() for t in (*leaves, p.weight)}
    return max(watch.sizes), 4 * m * max(n, k), [t.numel() for t in saved if t.data_ptr() not in own]


@pytest.mark.triton
@pytest.mark.parametrize("groups", [1, 3])
def test_triton_allocates_nothing_of_the_weights_size_and_keeps_only_x(groups):
    largest, expected, saved = _largest_allocation("triton", groups)
    # y and dx are the largest; the partial sums of u, v and f are a few times N + K
    assert largest <= max(expected, 4 * 12 * (96 + groups * 80)) < 4 * 96 * 80
    assert saved == []


def test_the_reference_keeps_no_rescaled_weight_either():
    _, _, saved = _largest_allocation("reference", 1)
    assert saved == []


def test_the_watch_would_see_a_rescaled_weight():
    """The formula by autograd does write W' and keep tensors of its size: the test above can fail."""
    largest, _, _ = _largest_allocation("reference", 1)
    assert largest >= 4 * 96 * 80
    p = make_problem(8, 96, 80)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        reference.formula(p.x.requires_grad_(), p.weight, p.scale_out.requires_grad_(), p.scale_in.requires_grad_())
    assert max(saved) >= 96 * 80


@pytest.mark.gpu
def test_gpu_memory_above_a_plain_linear(gpu):
    """Forward and backward of a 4096 x 4096 layer take less than 2 MiB beyond their outputs."""
    p = make_problem(512, 4096, 4096, dtype=torch.bfloat16, device=gpu)
    x, u, v, f = (t.clone().requires_grad_() for t in (p.x, p.scale_out, p.scale_in, p.shift))
    rescaled_linear(x, p.weight, u, v, p.bias, f).backward(p.dy)
    x.grad = u.grad = v.grad = f.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    rescaled_linear(x, p.weight, u, v, p.bias, f).backward(p.dy)
    torch.cuda.synchronize()
    outputs = 2 * 512 * (4096 + 4096)
    assert torch.cuda.max_memory_allocated() - before < outputs + 2 * 2**20 + 2**20


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_sets_the_dtype_of_the_product_and_leaves_parameters_alone(backend):
    device = require(backend)
    p = make_problem(9, 8, 12, device=device)
    leaves = [t.clone().requires_grad_() for t in (p.x, p.scale_out, p.scale_in, p.shift)]
    x, u, v, f = leaves
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        y = rescaled_linear(x, p.weight, u, v, p.bias, f)
        with torch.autocast(device, enabled=False):
            assert rescaled_linear(x, p.weight, u, v).dtype is torch.float32
    assert y.dtype is torch.bfloat16
    with use_backend(backend):
        assert torch.equal(y, rescaled_linear(p.x.bfloat16(), p.weight, u, v, p.bias, f))
    y.backward(p.dy.bfloat16())
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 4
    exact = [t.double().requires_grad_() for t in (p.x, p.scale_out, p.scale_in, p.shift)]
    y = reference.formula(exact[0], p.weight.double(), exact[1], exact[2], p.bias.double(), exact[3])
    y.backward(p.dy.double())
    for got, want in zip(leaves, exact, strict=True):
        assert (got.grad - want.grad).norm() < 0.02 * want.grad.norm()


def test_autocast_leaves_float64_alone():
    p = make_problem(9, 8, 12, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = rescaled_linear(*p.forward_args)
    assert torch.equal(y, rescaled_linear(*p.forward_args))


def test_no_grad_and_inference_mode_keep_nothing():
    p = make_problem(9, 8, 12)
    p.scale_out.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not rescaled_linear(*p.forward_args).requires_grad


@pytest.mark.parametrize("groups", [1, 3])
def test_gradgradcheck_in_float64(groups):
    """A gradient penalty is not silently left out."""
    p = make_problem(3, 6, 4, groups, torch.float64)
    assert torch.autograd.gradgradcheck(rescaled_linear, tuple(t.requires_grad_() for t in p.forward_args))


def test_it_compiles_without_a_graph_break():
    torch._dynamo.reset()
    p = make_problem(9, 8, 12, 2)
    eager = _run(p, "auto")
    served: list[str] = []
    backend = linear._backend
    spy = mock.patch.object(linear, "_backend", lambda *a: (served.append("op"), backend(*a))[1])
    with (
        spy,
        mock.patch(f"{__name__}.rescaled_linear", torch.compile(rescaled_linear, fullgraph=True, backend="aot_eager")),
    ):
        compiled = _run(p, "auto")
    assert len(served) == 3, "forward, grad_input and grad_scales are ops in the compiled graph too"
    assert torch.equal(eager[0], compiled[0])
    assert torch.equal(eager[1], compiled[1])
    assert all(torch.equal(a, b) for a, b in zip(eager[2], compiled[2], strict=True))


def _inputs(**changes):
    p = make_problem(5, 6, 4)
    return dict(zip(NAMES, p.forward_args, strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "x: expected float16.* got torch.int64"),
        ({"x": torch.zeros(5, 4, dtype=torch.complex64)}, TypeError, "x: expected float16.* got torch.complex64"),
        ({"x": torch.zeros(5, 3)}, ValueError, r"x: expected shape \[..., 4\] for weight \[6, 4\], got \[5, 3\]"),
        ({"x": torch.zeros(())}, ValueError, r"x: expected shape \[..., 4\].* got \[\]"),
        ({"x": torch.zeros(5, 4, dtype=torch.float64)}, TypeError, "weight: float64 goes with float64 only"),
        ({"x": torch.zeros(5, 4, device="meta")}, ValueError, "weight: expected device meta as x, got cpu"),
        ({"weight": torch.zeros(6)}, ValueError, r"weight: expected shape \[N, K\], got \[6\]"),
        ({"weight": torch.zeros(6, 4, dtype=torch.int8)}, TypeError, "weight: expected float16.* got torch.int8"),
        ({"scale_out": torch.zeros(5)}, ValueError, r"scale_out: expected shape \[6\] or \[6, 1\], got \[5\]"),
        ({"scale_out": torch.zeros(6, 1, 1)}, ValueError, r"scale_out: expected shape"),
        ({"scale_out": torch.zeros(6, 2)}, ValueError, "scale_out: expected rank 1, got rank 2"),
        ({"scale_in": torch.zeros(5)}, ValueError, r"scale_in: expected shape \[4\].* got \[5\]"),
        ({"scale_in": torch.zeros(2, 4)}, ValueError, "scale_in: expected rank 1, got rank 2"),
        ({"scale_in": torch.zeros(4, 1, 4)}, ValueError, "groups that divides N = 6, got 4"),
        ({"scale_in": torch.zeros(0, 1, 4)}, ValueError, "groups that divides N = 6, got 0"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \[6\], got \[4\]"),
        ({"shift": torch.zeros(1, 6)}, ValueError, r"shift: expected shape \[6\], got \[1, 6\]"),
        ({"shift": torch.zeros(6, dtype=torch.bool)}, TypeError, "shift: expected float16.* got torch.bool"),
    ],
)
def test_bad_input_is_one_clear_error(changes, kind, words):
    with pytest.raises(kind, match=words):
        rescaled_linear(**_inputs(**changes))


def test_nan_is_not_an_error_and_stays_in_its_row():
    inputs = _inputs()
    inputs["x"][2, 1] = float("nan")
    y = rescaled_linear(**inputs)
    assert torch.isnan(y[2]).all()
    assert torch.isfinite(y[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8)])
def test_the_result_may_be_changed_in_place_as_nn_linears_may(shape):
    """BEiT's and EVA's attention add their bias to it so."""
    torch.manual_seed(0)
    x, w = torch.randn(shape), torch.randn(6, 8)
    u, v, extra = (torch.randn(s, requires_grad=True) for s in ((6, 1), (1, 8), (6,)))
    y = rescaled_linear(x, w, u, v)
    y += extra
    y.square().sum().backward()
    expected = x @ (w * (1 + u * v)).mT + extra
    grads = torch.autograd.grad(expected.square().sum(), (u, v, extra))
    for given, right in zip((u.grad, v.grad, extra.grad), grads, strict=True):
        assert torch.allclose(given, right, rtol=1e-4, atol=1e-4)
