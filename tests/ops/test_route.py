"""Whoever must see the ops sees them, also on a torch without one of its private parts; otherwise backends are called.

Missing parts are replaced one at a time by what ``route.py`` has for a version of torch that lacks them.
"""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import rlrr_kernels
from rlrr_kernels import rescaled_linear
from rlrr_kernels.backends import reference
from rlrr_kernels.ops import linear, route
from tests.oracle import make_problem
from tests.reliability.test_transforms import TRANSFORMS, arguments, assert_same, batched_gradients, written_out

#: TorchScript's tracer warns that it is deprecated, and that shapes are checked.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")

PASSES = ["forward", "grad_input", "grad_scales"]
MODES = ("_dispatch_modes", "_function_modes", "_pre_dispatch_modes")
FALLBACKS = {
    **dict.fromkeys((*MODES, "_is_profiling", "_is_zero_tensor"), route._assume_yes),
    "_is_tracing": torch.jit.is_tracing,
    "_transform": route._probe_transform,
    "_is_batched": route._has_no_memory,
    "_dual_level": route._probe_dual_level,
}


@pytest.fixture(params=[None, *FALLBACKS])
def any_torch(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(route, request.param, FALLBACKS[request.param])


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


@pytest.mark.usefixtures("any_torch")
def test_modes_and_profilers_see_the_ops():
    with Recorder() as recorder:
        _step(make_problem(3, 4, 5))
    assert recorder.seen == PASSES
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        _step(make_problem(3, 4, 5))
    assert {f"rlrr::{name}" for name in PASSES} <= {event.name for event in record.events()}


@pytest.mark.usefixtures("any_torch")
def test_tracers_see_the_ops_or_plain_pytorch():
    p = make_problem(3, 4, 5)

    def layer(x):
        return rescaled_linear(x, *p.forward_args[1:])

    graph = make_fx(layer, pre_dispatch=True)(p.x)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "rlrr.forward.default" in targets
    assert not [name for name in targets if name.startswith("rlrr_cpu")]
    traced = torch.jit.trace(layer, (2 * p.x,), check_trace=False)
    torch.testing.assert_close(traced(p.x), layer(p.x))


@pytest.mark.usefixtures("any_torch")
@pytest.mark.parametrize("function", [rescaled_linear, linear.forward])
def test_transforms_are_right(function):
    a = arguments()
    for name in ("grad", "vmap over x", "jvp", "dual numbers", "hessian", "forward over reverse"):
        assert_same(TRANSFORMS[name](function, a), TRANSFORMS[name](written_out, a))


@pytest.mark.usefixtures("any_torch")
def test_no_kernel_is_given_a_batch_of_gradients():
    """On the CPU PyTorch would call an op once for each of them; a Triton kernel would ask for their memory."""
    forward_alone = SimpleNamespace(forward=reference.forward)
    a = arguments()
    with mock.patch.object(linear, "_backend", return_value=forward_alone):
        got = batched_gradients(rescaled_linear, a)
    assert_same(got, batched_gradients(written_out, a))


@pytest.mark.usefixtures("any_torch")
def test_gradients_that_are_only_marked_as_negated_or_zero():
    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, mark):
            ctx.mark = mark
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return ctx.mark(grad), None

    for mark in (lambda g: torch.complex(g, -g).conj().imag, lambda g: torch._efficientzerotensor(g.shape).double()):
        found = []
        for layer in (rescaled_linear, written_out):
            leaves = [t.clone().requires_grad_() for t in arguments()]
            found.append(torch.autograd.grad(Marked.apply(layer(*leaves), mark).sin().sum(), leaves))
        assert_same(*found)


def test_what_must_go_through_the_dispatcher_and_what_need_not():
    class Subclass(torch.Tensor):
        pass

    x, seen = torch.zeros(2, 3), []

    def ask(t):
        seen.append(route.can_skip_dispatcher(t))
        return t.sum()

    assert route.can_skip_dispatcher(x, torch.nn.Parameter(x), None)
    negated = torch.complex(x, x).conj().imag
    for t in (x.as_subclass(Subclass), negated, torch._efficientzerotensor(2, 3), x.to("meta")):
        ask(t)
    torch.func.grad(ask)(x)
    with torch.overrides.BaseTorchFunctionMode():
        ask(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    make_fx(ask, pre_dispatch=True)(x)
    assert seen == [False] * 8


def test_where_nobody_watches_both_passes_call_the_backend_itself(monkeypatch):
    p = make_problem(3, 4, 5)
    expected = _step(p)
    monkeypatch.setattr(torch.ops, "rlrr", None)
    monkeypatch.setattr(linear, "forward", None)
    for ours, exact in zip(_step(p), expected, strict=True):
        assert torch.equal(ours, exact)


PUBLIC = """
import torch
part = torch._C._AutoDispatchBelowAutograd
del torch._C._AutoDispatchBelowAutograd
from rlrr_kernels.ops import linear, route
torch._C._AutoDispatchBelowAutograd = part
from tests.reliability.test_transforms import arguments, written_out
assert route.BelowAutograd is None
leaves = [t.requires_grad_() for t in arguments()]
for y in (linear.forward(*leaves), torch.ops.rlrr.forward(*leaves)):
    gradients = torch.autograd.grad(y.sin().sum(), leaves)
    for ours, exact in zip(gradients, torch.autograd.grad(written_out(*leaves).sin().sum(), leaves)):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
"""


@pytest.mark.slow
def test_the_op_differentiates_by_pytorchs_public_way_too():
    """Ops are registered once, so in a process of its own."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", PUBLIC], check=True)


def test_route_alone_asks_private_parts_of_torch():
    files = Path(rlrr_kernels.__file__).parent.rglob("*.py")
    assert {f.name for f in files if "torch._C" in f.read_text()} == {"route.py"}
