"""rescaled_linear and its ops: gradients, work that is not needed, memory, errors for bad input, opcheck."""

import contextlib
import itertools
from collections.abc import Iterable
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rlrr_kernels import rescaled_linear, use_backend
from rlrr_kernels.ops import linear
from tests.oracle import BACKENDS, Answer, backends_with, check, device_of, make_problem, require


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
@pytest.mark.parametrize(("groups", "rank"), [(1, 1), (3, 1), (1, 3), (3, 3)])
@pytest.mark.parametrize(("bias", "shift"), list(itertools.product([False, True], repeat=2)))
def test_gradcheck_in_float64(backend, groups, rank, bias, shift):
    require(backend, torch.float64, rank=rank)
    p = make_problem(5, 6, 4, groups, torch.float64, bias=bias, shift=shift, rank=rank)
    inputs = [t if t is None else t.requires_grad_() for t in p.forward_args]
    with use_backend(backend):
        assert torch.autograd.gradcheck(rescaled_linear, tuple(inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 4), (2, 2, 3, 2)], ids=str)
def test_inputs_of_one_to_four_dimensions(backend, shape):
    m = int(torch.Size(shape).numel())
    p = make_problem(m, 18, 20, 3, torch.bfloat16, device=require(backend, torch.bfloat16))
    y, dx, (du, dv), offsets = _run(p, backend, p.x.view(*shape, 20), p.dy.view(*shape, 18))
    assert y.shape == (*shape, 18)
    assert dx.shape == (*shape, 20)
    check(p, Answer(y.view(m, 18), dx.view(m, 20), du, dv, offsets["shift"]))


@pytest.mark.parametrize(
    ("u_shape", "v_shape"),
    [((6,), (4,)), ((6, 1), (1, 4)), ((6,), (1, 1, 4)), ((6, 1), (4,)), ((6, 3), (3, 4)), ((6, 2), (1, 2, 4))],
    ids=str,
)
def test_scale_shapes_are_free_and_gradients_follow_them(u_shape, v_shape):
    p = make_problem(5, 6, 4, rank=u_shape[1] if len(u_shape) == 2 else 1)
    u, v = p.scale_out.view(u_shape).requires_grad_(), p.scale_in.view(v_shape).requires_grad_()
    y = rescaled_linear(p.x, p.weight, u, v)
    y.backward(p.dy)
    assert torch.equal(y, rescaled_linear(p.x, p.weight, p.scale_out, p.scale_in))
    assert u.grad.shape == u_shape
    assert v.grad.shape == v_shape


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

    backend = linear._backend("forward", p.x, p.weight)

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
    backend = linear._backend("forward", p.x, p.weight)
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


def _inputs(**changes):
    p = make_problem(5, 6, 4)
    return dict(zip(NAMES, p.forward_args, strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
        (
            {"x": torch.nested.nested_tensor([[[0.0] * 4]], layout=torch.jagged)},
            TypeError,
            "x: expected a dense tensor",
        ),
        ({"x": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "x: expected float16.* got torch.int64"),
        ({"x": torch.zeros(5, 4, dtype=torch.complex64)}, TypeError, "x: expected float16.* got torch.complex64"),
        ({"x": torch.zeros(5, 3)}, ValueError, r"x: expected shape \[..., 4\] for weight \[6, 4\], got \[5, 3\]"),
        ({"x": torch.zeros(())}, ValueError, r"x: expected shape \[..., 4\].* got \[\]"),
        ({"x": torch.zeros(5, 4, dtype=torch.float64)}, TypeError, "weight: float64 goes with float64 only"),
        ({"x": torch.zeros(5, 4, device="meta")}, ValueError, "weight: expected device meta as x, got cpu"),
        ({"weight": torch.zeros(6)}, ValueError, r"weight: expected shape \[N, K\], got \[6\]"),
        ({"weight": torch.zeros(6, 4, dtype=torch.int8)}, TypeError, "weight: expected float16.* got torch.int8"),
        ({"scale_out": torch.zeros(5)}, ValueError, r"scale_out: expected shape \[6\] or \[6, r\], got \[5\]"),
        ({"scale_out": torch.zeros(6, 1, 1)}, ValueError, r"scale_out: expected shape"),
        ({"scale_out": torch.zeros(6, 0)}, ValueError, "scale_out: expected a rank from 1 to 128, got rank 0"),
        ({"scale_out": torch.zeros(6, 129)}, ValueError, "scale_out: expected a rank from 1 to 128, got rank 129"),
        ({"scale_out": torch.zeros(6, 2)}, ValueError, "scale_in: expected rank 2 as scale_out, got rank 1"),
        ({"scale_out": torch.zeros(6, 2), "scale_in": torch.zeros(4)}, ValueError, r"scale_in: .* \[2, 4\] or \[g"),
        ({"scale_in": torch.zeros(5)}, ValueError, r"scale_in: expected shape \[4\].* got \[5\]"),
        ({"scale_in": torch.zeros(2, 4)}, ValueError, "scale_in: expected rank 1 as scale_out, got rank 2"),
        ({"scale_in": torch.zeros(2, 3, 4)}, ValueError, "scale_in: expected rank 1 as scale_out, got rank 3"),
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


M, N, K = 5, 6, 4
GIVEN = {"x": (M, K), "weight": (N, K), "scale_out": (N, 1), "scale_in": (2, 1, K), "shift": (N,), "dy": (M, N)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        {"x": (M, K + 1)},
        {"x": (1, M, K)},
        {"weight": (N + 2, K)},
        {"scale_out": (N,)},
        {"scale_out": (N, 2)},
        {"scale_out": (N, 0), "scale_in": (2, 0, K)},
        {"scale_out": (N, 129), "scale_in": (2, 129, K)},
        {"scale_in": (1, K)},
        {"scale_in": (4, 1, K)},
        {"scale_in": (2, 1, K - 1)},
        {"shift": (1,)},
        {"dy": (M - 1, N)},
    ],
    ids=str,
)
def test_an_op_that_is_called_directly_refuses_what_its_kernels_could_not_take(backend, change):
    """Compiled and exported programs call them; the kernels themselves check nothing."""
    device = require(backend, torch.float32)
    x, w, u, v, f, dy = (torch.ones(shape, device=device) for shape in (GIVEN | change).values())
    calls = {
        "forward": lambda: linear.forward(x, w, u, v, None, f),
        "grad_input": lambda: linear.grad_input(dy, w, u, v),
        "grad_scales": lambda: linear.grad_scales(dy, x, w, u, v, True),
    }
    takes = {"x": ("forward", "grad_scales"), "shift": ("forward",), "dy": ("grad_scales",)}
    with use_backend(backend):
        for name in takes.get(next(iter(change)), calls):
            with pytest.raises(ValueError, match=r"^rlrr op: expected"):
                calls[name]()
        u.requires_grad_()  # as in exported programs that train
        if "dy" not in change:
            with pytest.raises(ValueError, match=r"^rlrr op: expected"):
                linear.forward(x, w, u, v, None, f)


def test_an_op_that_is_called_directly_refuses_dy_of_another_dtype():
    x, w, u, v, _, dy = (torch.ones(shape) for shape in GIVEN.values())
    with pytest.raises(ValueError, match=r"^rlrr op: expected dy .* of torch.float32 .* of torch.bfloat16"):
        linear.grad_scales(dy.bfloat16(), x, w, u, v, True)
    with pytest.raises(ValueError, match=r"^rlrr op: expected dy \[M, N\], got \[1, 5, 6\]"):
        linear.grad_shift(dy[None])


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


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("backend", "dtype"), backends_with([torch.bfloat16, torch.float64]))
def test_opcheck(backend, dtype, rank):
    p = make_problem(3, 4, 5, 2, dtype, rank=rank, device=require(backend, dtype, rank=rank))
    scales = (p.weight, p.scale_out, p.scale_in)
    with use_backend(backend):
        for bias, shift in ((p.bias, p.shift), (None, None)):
            torch.library.opcheck(linear.forward, (p.x, *scales, bias, shift))
        torch.library.opcheck(linear.grad_input, (p.dy, *scales))
        for need_shift in (True, False):
            torch.library.opcheck(linear.grad_scales, (p.dy, p.x, *scales, need_shift))
        torch.library.opcheck(linear.grad_shift, (p.dy,))


def test_fakes_follow_symbolic_sizes():
    with FakeTensorMode():
        x, w, u, v = torch.empty(5, 8), torch.empty(6, 8), torch.empty(6, 3), torch.empty(2, 3, 8)
        assert linear.forward(x.bfloat16(), w, u, v, None, None).dtype is torch.bfloat16
        du, dv, df = linear.grad_scales(torch.empty(5, 6).bfloat16(), x.bfloat16(), w, u, v, True)
        assert [t.shape for t in (du, dv, df)] == [(6, 3), (2, 3, 8), (6,)]
        alone = linear.grad_shift(torch.empty(5, 6).bfloat16())
        assert alone.shape == (6,)
        assert {t.dtype for t in (du, dv, df, alone)} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_that_are_only_marked_as_negated(backend):
    """An imaginary part of a conjugate has its sign in a flag, not in its memory; so may the gradient of y."""
    p = make_problem(9, 8, 12, 2, device=require(backend, torch.float32))
    negated = torch.complex(torch.zeros_like(p.x), -p.x).conj().imag
    assert negated.is_neg()
    assert torch.equal(negated, p.x)
    with use_backend(backend):
        trained = [t.detach().requires_grad_() for t in (negated, p.scale_out, p.scale_in, p.shift)]
        x, u, v, f = trained
        y = rescaled_linear(x, p.weight, u, v, p.bias, f)
        # autograd hands back a negated gradient of the imaginary part
        torch.complex(torch.zeros_like(y), y).conj().imag.backward(-p.dy)
        plain = [t.detach().clone().requires_grad_() for t in (p.x, p.scale_out, p.scale_in, p.shift)]
        expected = rescaled_linear(plain[0], p.weight, plain[1], plain[2], p.bias, plain[3])
        expected.backward(p.dy)
    # a wrong sign is as large as the value; the order of a sum may follow the strides
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(trained, plain, strict=True):
        assert torch.allclose(got.grad, want.grad, rtol=1e-5, atol=1e-5)
