"""torch.compile: one graph, few compilations, the values and gradients of eager."""

import functools
import os
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, apply_rlrr, use_backend
from rlrr_kernels.backends import choice, reference
from rlrr_kernels.ops import linear
from tests.oracle import assert_close
from tests.small_models import X, small_swin, small_vit, stir

SIZES = (5, 7, 9, 2, 64)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def make(kind: str, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "linear": lambda: FusedRLRRLinear(16, 12, dtype=dtype),
        "groups": lambda: FusedRLRRLinear(16, 12, bias=False, groups=3, dtype=dtype),
        "rank": lambda: FusedRLRRLinear(16, 12, groups=3, rank=4, scaling=0.5, dtype=dtype),
        "norm": lambda: SSFLayerNorm(16, dtype=dtype),
        "affine": lambda: SSFAffine(16, dtype=dtype),
        "block": lambda: nn.Sequential(
            SSFLayerNorm(16, dtype=dtype),
            FusedRLRRLinear(16, 48, groups=3, dtype=dtype),
            nn.GELU(),
            FusedRLRRLinear(48, 16, dtype=dtype),
            SSFAffine(16, dtype=dtype),
        ),
    }
    return layers[kind]()


def compiled(module, backend="aot_eager", **options):
    """Without a graph break, and a count of compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, fullgraph=True, backend=counter, **options), counter


def step(run, module, x):
    """y, and the gradients of x and of all that trains."""
    x = x.clone().requires_grad_()
    y = run(x)
    trained = [p for p in module.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *trained], y.detach().cos())]


def assert_equal(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("dynamic", "compilations"), [(None, 2), (True, 1)], ids=["automatic", "dynamic"])
@pytest.mark.parametrize(
    ("kind", "lead"),
    [("linear", ()), ("linear", (2,)), ("groups", ()), ("rank", ()), ("norm", (2,)), ("affine", (2,))],
    ids=str,
)
def test_a_few_compilations_serve_every_number_of_tokens(kind, lead, dynamic, compilations):
    module = make(kind)
    counts = []
    run, counter = compiled(module, dynamic=dynamic)
    for size in SIZES:
        x = torch.randn(*lead, size, 16)
        assert_equal(step(run, module, x), step(module, module, x))
        counts.append(counter.frame_count)
    assert counts[compilations - 1 :] == [counts[-1]] * (len(SIZES) - compilations + 1)
    # of F.layer_norm with dynamic=True the first call makes two graphs, nn.LayerNorm's too
    assert counts[-1] == (2 if kind == "norm" else compilations)


def test_batch_and_tokens_may_both_change():
    module = make("linear")
    run, counter = compiled(module, dynamic=True)
    for shape in ((2, 5), (3, 7), (5, 2), (11, 13)):
        x = torch.randn(*shape, 16)
        assert_equal(step(run, module, x), step(module, module, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(16,), (1, 16), (0, 16), (2, 0, 16), (2, 3, 4, 16)], ids=str)
def test_unusual_shapes_compile_too(shape):
    module = make("linear")
    run, _ = compiled(module)
    x = torch.randn(shape)
    assert_equal(step(run, module, x), step(module, module, x))


def test_a_backend_asked_for_after_compiling_serves_without_recompiling():
    module, x, served = make("linear"), torch.randn(5, 16), []
    run, counter = compiled(module)
    run(x)

    def chosen(kernel, x, weight, scale_in):
        served.append(choice.backend_for(x, weight, kernel))
        return reference

    with mock.patch.object(linear, "_backend", chosen):
        with use_backend("reference"):
            run(x)
        with use_backend("triton"), mock.patch.object(choice, "refusal", return_value=None):
            run(x)
        with mock.patch.dict(os.environ, RLRR_BACKEND="reference"):
            run(x)
    assert served == ["reference", "triton", "reference"]
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "make_model",
    [
        pytest.param(functools.partial(small_vit, depth=1), id="vit"),
        pytest.param(functools.partial(small_swin, depths=(1, 2)), id="swin", marks=pytest.mark.slow),
    ],
)
def test_a_whole_model_has_the_loss_and_gradients_of_eager(make_model):
    model = stir(apply_rlrr(make_model(drop_path_rate=0.0)))
    run, counter = compiled(model, dynamic=False)
    for train in (True, False):
        model.train(train)
        assert_equal(step(run, model, X), step(model, model, X))
    assert counter.frame_count == 2, "one for each mode"


def test_merging_and_switching_off_after_compiling_take_effect():
    module = make("linear").eval()
    module.shift.data.normal_()
    run, _ = compiled(module)
    x = torch.randn(5, 16)
    rescaled = run(x)
    frozen = nn.functional.linear(x, module.weight, module.bias)
    assert torch.equal(rescaled, module(x))
    module.enabled = False
    assert torch.equal(run(x), frozen)
    module.enabled = True
    assert torch.equal(run(x), rescaled)
    module.merge()
    assert torch.equal(run(x), nn.functional.linear(x, *module.to_linear().parameters()))
    module.enabled = False
    assert torch.equal(run(x), frozen)
    module.enabled = True
    module.unmerge()
    assert torch.equal(run(x), rescaled)
    norm = make("norm")
    run, _ = compiled(norm)
    assert torch.equal(run(x), norm(x))
    norm.enabled = False
    assert torch.equal(run(x), nn.functional.layer_norm(x, (16,)))


def test_autocast_and_modes_without_gradients_around_the_compiled_call():
    module = make("block")
    run, _ = compiled(module)
    x = torch.randn(5, 16)
    for context in (
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
        torch.inference_mode,
    ):
        with context():
            assert_equal([run(x)], [module(x)])
    assert_equal(step(run, module, x), step(module, module, x))


def test_autocast_inside_the_compiled_function():
    module = make("linear")

    def narrowed(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
            with torch.autocast("cpu", enabled=False):
                return y.float() + module(x)

    run, _ = compiled(narrowed)
    x = torch.randn(5, 16)
    assert_equal(step(run, module, x), step(narrowed, module, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_inside(reentrant):
    module = make("linear")

    def recomputed(x):
        return checkpoint(module, x, use_reentrant=reentrant).sin()

    run, _ = compiled(recomputed)
    x = torch.randn(5, 16)
    assert_equal(step(run, module, x), step(lambda x: module(x).sin(), module, x))


def test_compiled_autograd_runs_the_backward_passes():
    module, x = make("block"), torch.randn(5, 16, requires_grad=True)
    right = step(module, module, x.detach())[1:]
    y = module(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        y.backward(y.detach().cos())
    assert_equal([x.grad, *(p.grad for p in module.parameters() if p.requires_grad)], right)
    assert counters["compiled_autograd"]["captures"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_is_as_exact_as_eager(mode):
    module, x = make("block"), torch.randn(5, 16)
    run = torch.compile(module, fullgraph=True, mode=mode)
    exact = make("block", torch.float64)
    exact.load_state_dict(module.state_dict())
    got, plain, right = step(run, module, x), step(module, module, x), step(exact, exact, x.double())
    for name, *results in zip(("y", "dx", *range(9)), got, plain, right, strict=False):
        assert_close(str(name), *results)
    assert len(got) == len(plain) == 2 + 2 + 3 + 3 + 2


def test_a_compiled_graph_holds_the_ops():
    """Otherwise the tests above would compare the formula to itself."""
    module, seen = make("linear"), []
    backend = linear._backend
    run, _ = compiled(module)
    with mock.patch.object(linear, "_backend", lambda *a: (seen.append(1), backend(*a))[1]):
        step(run, module, torch.randn(5, 16))
    assert len(seen) == 3


@pytest.mark.gpu
def test_cuda_graphs_of_the_compiler_capture_every_op(gpu):
    """reduce-overhead on a GPU: replays give what eager gives, of each new input."""
    module = make("block").to(gpu)
    run = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(64, 16, device=gpu)
        given = x.clone()
        got = [t.clone() for t in step(run, module, x)]
        assert torch.equal(x, given)
        for ours, theirs in zip(got, step(module, module, x), strict=True):
            torch.testing.assert_close(ours, theirs)  # inductor's own LayerNorm and GELU round otherwise
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graphs_capture_eager_calls(gpu, backend, dtype):
    """Kernels started by their handles and by Triton's binder, forward and backward; replayed with other values."""
    layer = FusedRLRRLinear(64, 96, groups=3, device=gpu)
    static = torch.randn(128, 64, device=gpu, dtype=dtype)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with use_backend(backend):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(layer, layer, static)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            held = step(layer, layer, static)
        for seed in range(3):
            torch.manual_seed(seed)
            static.normal_()
            graph.replay()
            assert_equal(held, step(layer, layer, static))
