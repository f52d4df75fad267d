"""The registered ops: schemas, fakes, and what torch.library.opcheck says of them."""

import json
import re
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from rlrr_kernels import rescaled_linear, use_backend
from rlrr_kernels.ops import linear, route
from tests.oracle import BACKENDS, backends_with, make_problem, require
from tests.without_probe import OTHERS, PACKAGE, PARTS

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("backend", "dtype"), backends_with(DTYPES))
def test_opcheck(backend, groups, dtype):
    p = make_problem(7, 12, 10, groups, dtype, device=require(backend, dtype))
    scales = (p.weight, p.scale_out, p.scale_in)
    with use_backend(backend):
        for bias, shift in ((p.bias, p.shift), (None, None)):
            torch.library.opcheck(linear.forward, (p.x, *scales, bias, shift))
        torch.library.opcheck(linear.grad_input, (p.dy, *scales))
        for need_shift in (True, False):
            torch.library.opcheck(linear.grad_scales, (p.dy, p.x, *scales, need_shift))
        torch.library.opcheck(linear.grad_shift, (p.dy,))


def test_fakes_follow_symbolic_sizes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w, u, v = torch.empty(5, 8), torch.empty(6, 8), torch.empty(6, 1), torch.empty(2, 1, 8)
        assert linear.forward(x.bfloat16(), w, u, v, None, None).dtype is torch.bfloat16
        du, dv, df = linear.grad_scales(torch.empty(5, 6).bfloat16(), x.bfloat16(), w, u, v, True)
        assert [t.shape for t in (du, dv, df)] == [(6, 1), (2, 1, 8), (6,)]
        alone = linear.grad_shift(torch.empty(5, 6).bfloat16())
        assert alone.shape == (6,)
        assert {t.dtype for t in (du, dv, df, alone)} == {torch.float32}


class Recorder(TorchDispatchMode):
    """The names of the package's ops that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "rlrr":
            self.seen.append(func._opname)
        return func(*args, **(kwargs or {}))


def _step(p):
    trained = [t.requires_grad_() for t in (p.x, p.scale_out, p.scale_in, p.shift)]
    return torch.autograd.grad(rescaled_linear(*p.forward_args), trained, p.dy)


ALL = ["forward", "grad_input", "grad_scales"]


def test_a_mode_sees_the_ops():
    with Recorder() as recorder:
        _step(make_problem(3, 4, 5))
    assert recorder.seen == ALL


def test_a_profiler_sees_the_ops():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        _step(make_problem(3, 4, 5))
    names = {event.name for event in record.events()}
    assert {f"rlrr::{name}" for name in ALL} <= names


def test_a_compiler_sees_the_ops_and_its_results_are_those_of_eager():
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "rlrr" in str(node.target)])
        return graph

    p = make_problem(3, 4, 5)
    compiled = torch.compile(rescaled_linear, fullgraph=True, backend=backend)
    assert torch.equal(compiled(*p.forward_args), rescaled_linear(*p.forward_args))
    assert graphs == [["rlrr.forward.default"]]


def test_subclasses_and_transforms_go_through_the_dispatcher():
    class Subclass(torch.Tensor):
        pass

    x = torch.zeros(2, 3)
    assert route.can_skip_dispatcher(x, torch.nn.Parameter(x))
    assert not route.can_skip_dispatcher(x, x.as_subclass(Subclass))
    seen = []
    torch.func.grad(lambda t: (seen.append(route.can_skip_dispatcher(t)), t.sum())[1])(x)
    assert seen == [False]


def test_nobody_watching_the_backend_is_called_itself():
    p = make_problem(3, 4, 5)
    assert route.can_skip_dispatcher(p.x, p.weight)
    seen = []
    library_call = torch.ops.rlrr.forward.default
    assert linear.forward is library_call
    backend = linear._backend("forward", p.x, p.weight, p.scale_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "forward", lambda *a: seen.append("op"))
        patch.setattr(backend, "forward", lambda *a: (seen.append("backend"), torch.zeros(3, 4))[1])
        rescaled_linear(*p.forward_args)
    assert seen == ["backend"]


def test_marked_traced_and_watched_calls_go_through_the_dispatcher():
    x = torch.zeros(2, 3)
    assert route.can_skip_dispatcher(x, None)
    assert not route.can_skip_dispatcher(torch.complex(x, x).conj().imag)
    assert not route.can_skip_dispatcher(torch._efficientzerotensor(2, 3))
    assert not route.can_skip_dispatcher(x.to("meta"))
    seen = []
    with torch.overrides.BaseTorchFunctionMode():
        seen.append(route.can_skip_dispatcher(x))
    torch.jit.trace(lambda t: (seen.append(route.can_skip_dispatcher(t)), t + 1)[1], (x,), check_trace=False)
    make_fx(lambda t: (seen.append(route.can_skip_dispatcher(t)), t + 1)[1], pre_dispatch=True)(x)
    assert seen == [False, False, False]


def test_tracing_before_dispatch_records_the_ops():
    p = make_problem(3, 4, 5)
    graph = make_fx(lambda x: rescaled_linear(x, *p.forward_args[1:]), pre_dispatch=True)(p.x)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "rlrr.forward.default" in targets
    assert not [name for name in targets if name.startswith("rlrr_cpu")]


def test_on_the_meta_device_shapes_alone_are_found():
    """As a whole model is tried without data."""
    x, w, u, v, f = (
        torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((2, 3, 8), (6, 8), (6, 1), (1, 8), (6,))
    )
    y = rescaled_linear(x.requires_grad_(), w, u.requires_grad_(), v, None, f)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 6), torch.bfloat16, "meta")
    dx, du = torch.autograd.grad(y, (x, u), torch.empty_like(y))
    assert (dx.shape, du.shape, du.dtype) == (x.shape, u.shape, torch.bfloat16)


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


def test_backward_calls_the_backend_itself():
    p = make_problem(5, 6, 4)
    for t in (p.x, p.scale_out, p.scale_in, p.shift):
        t.requires_grad_()
    y = rescaled_linear(*p.forward_args)
    with (
        mock.patch.object(linear.torch.ops, "rlrr", None),
    ):
        y.backward(p.dy)
    assert p.x.grad is not None


@pytest.mark.slow
@pytest.mark.parametrize("parts", [["none", *PARTS, *OTHERS]], ids=["all"])
def test_without_any_one_private_part_of_torch_all_is_right(parts):
    """Modes, profilers, tracers, transforms, gradients, dual numbers, on a torch that lacks one part after another."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.without_probe", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert list(found) == parts
    for part, failure in found.items():
        assert failure == "", f"without {part}: {failure}"


def test_no_private_part_of_torch_is_asked_but_those_that_can_be_missing():
    used = {
        (path.name, part)
        for path in PACKAGE.rglob("*.py")
        for part in re.findall(r"\btorch\._(?!_)[\w.]+", path.read_text())
    }
    assert len(PARTS) == 8
    assert used == {
        ("route.py", "torch._C"),
        # not at a call: a type; assigning to a parameter; averaging weights
        ("export.py", "torch._ops"),
        ("linear.py", "torch._has_compatible_shallow_copy_type"),
        ("ema.py", "torch._foreach_lerp_"),
    }
