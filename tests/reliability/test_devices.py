"""Several GPUs in one process, streams and graphs: device guards with mocked GPUs; all else needs real ones."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, rescaled_linear, use_backend
from rlrr_kernels.backends import choice, tuned
from rlrr_kernels.backends.triton import choose, launch, norm
from rlrr_kernels.backends.triton import start as start_module
from tests.oracle import Answer, check, make_problem

HOPPER = launch.INTERPRETED_DEVICE


class GPUs:
    """Two mocked GPUs: which one is current, which were asked for properties, and what was launched on which."""

    def __init__(self, monkeypatch):
        self.current, self.entered, self.launched, self.asked = 0, [], [], []
        self.fails = False

        @contextlib.contextmanager
        def device(target):
            before, self.current = self.current, torch.device(target).index
            self.entered.append(self.current)
            try:
                yield
            finally:
                self.current = before

        def launched(kernel, grid, operands, free, numbers, constants, options, index):
            self.launched.append((kernel, self.current, index, {o.device.index for o in operands}))
            if self.fails:
                raise RuntimeError("the launch failed")

        def found(*arguments):
            self.asked.append(arguments[-1].index)

        def properties(index):
            self.asked.append(index)
            return HOPPER

        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", device)
        monkeypatch.setattr(launch, "start", launched)
        monkeypatch.setattr(norm, "start", launched)
        monkeypatch.setattr(launch, "interpreting", lambda: False)
        monkeypatch.setattr(tuned, "find", found)
        monkeypatch.setattr(choose, "cuda_device", properties)
        # a fake tensor has no address
        monkeypatch.setattr(launch, "_loadable", lambda weight, *activations: (True, activations))


@pytest.fixture
def gpus(monkeypatch):
    with FakeTensorMode():
        yield GPUs(monkeypatch)


def passes(device, m=64, n=96, k=4096):
    """Each pass of each Triton module, of tensors on this device."""
    new = {"device": device, "dtype": torch.bfloat16}
    x, dy, w = torch.empty(m, k, **new), torch.empty(m, n, **new), torch.empty(n, k, **new)
    u, v, f = (torch.empty(s, device=device) for s in ((n, 1), (3, 1, k), (n,)))
    s, mean = torch.empty(k, device=device), torch.empty(m, 1, device=device)
    whole = choose.Choice(64, 32, 64, 4, 3)
    split = choose.Choice(64, 32, 64, 4, 3, splits=2)
    return {
        "forward": lambda: launch.forward(x, w, u, v, f, f, choice=whole),
        # so few tokens and so deep a sum that the rule splits it
        "forward, split": lambda: launch.forward(x, w, u, v, None, f),
        "grad_input": lambda: launch.grad_input(dy, w, u, v),
        "grad_input, split": lambda: launch.grad_input(dy, w, u, v, choice=split),
        "grad_scales": lambda: launch.grad_scales(dy, x, w, u, v, True),
        "layer_norm": lambda: norm.layer_norm(x, None, None, s, s, 1e-6, torch.bfloat16),
        "layer_norm_backward": lambda: norm.layer_norm_backward(x, x, mean, mean, None, None, s, True),
    }


#: Pass -> kernels it launches.
LAUNCHES = {
    "forward": 1,
    "forward, split": 2,
    "grad_input": 1,
    "grad_input, split": 2,
    "grad_scales": 2,
    "layer_norm": 1,
    "layer_norm_backward": 2,
}


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize(("current", "device"), [(0, 1), (1, 0), (1, 1), (0, 0)])
def test_every_launch_of_every_pass_happens_on_the_tensors_device(gpus, name, current, device):
    gpus.current = current
    results = passes(f"cuda:{device}")[name]()
    expected = (device, device, {device})
    assert [found[1:] for found in gpus.launched] == [expected] * LAUNCHES[name]
    assert gpus.current == current
    assert gpus.entered == ([] if current == device else [device]), (
        "one guard for a pass, none where the device is current"
    )
    assert set(gpus.asked) <= {device}, "properties, and what rlrr-tune measured"
    assert gpus.asked or name not in ("forward, split", "grad_input", "grad_scales")
    results = results if isinstance(results, tuple) else (results,)
    assert {t.device.index for t in results} == {device}


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_current_device_is_the_same_after_a_launch_that_failed(gpus, name):
    gpus.fails = True
    with pytest.raises(RuntimeError, match="the launch failed"):
        passes("cuda:1")[name]()
    assert gpus.launched[0][1] == 1
    assert gpus.current == 0


def test_compiled_kernels_are_kept_for_each_device(monkeypatch):
    """A kernel that is loaded on one GPU faults on another."""
    monkeypatch.setattr(start_module, "_handles", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked, started = [], []

    class Handle:
        def __init__(self, device):
            self.device = device

        def __getitem__(self, grid):
            return lambda *arguments: started.append(self.device)

    class Kernel:
        def __init__(self):
            self.arg_names, self.do_not_specialize = ["x", "free"], ["free"]

        def __getitem__(self, grid):
            def bind(*arguments, **options):
                asked.append(current)
                return Handle(current)

            return bind

    monkeypatch.setattr(start_module, "CompiledKernel", Handle)
    kernel, x = Kernel(), torch.empty(64)
    for current in (0, 1, 0, 1, 1):
        start_module.start(kernel, (1,), (x,), (0,), (), {}, {}, current)
    assert asked == [0, 1]
    assert started == [0, 1, 1]


def test_a_replica_of_data_parallel_computes_what_the_layer_does():
    """``nn.DataParallel`` makes a copy of the module for each GPU, with copies of parameters that are no leaves."""
    torch.manual_seed(0)
    for layer in (FusedRLRRLinear(12, 6, groups=3), FusedRLRRLinear(12, 6, False), SSFLayerNorm(12)):
        x = torch.randn(4, 12)
        layer(x).square().sum().backward()
        exact = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        layer.zero_grad()
        replicas = [layer._replicate_for_data_parallel() for _ in range(2)]
        for replica in replicas:
            for name, parameter in layer._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter.clone())
        ys = [replica(part) for replica, part in zip(replicas, x.chunk(2), strict=True)]
        torch.cat(ys).square().sum().backward()
        for name, grad in exact.items():
            torch.testing.assert_close(layer.get_parameter(name).grad, grad, msg=name)


@pytest.mark.parametrize(
    ("layer", "name"), [(FusedRLRRLinear(4, 4), "weight"), (SSFLayerNorm(4), "ssf_scale"), (SSFAffine(4), "ssf_scale")]
)
def test_tensors_on_two_devices_are_named(layer, name):
    with pytest.raises(ValueError, match=f"{name}: expected device meta as x, got cpu"):
        layer(torch.empty(2, 4, device="meta"))


# what follows runs on GPUs only

BACKENDS = ["triton", "cuda"]


@pytest.fixture(params=BACKENDS)
def on_gpu(request, gpu):
    """The device; skips with the backend's reason where it cannot serve."""
    x = torch.empty(1, 1, device=gpu)
    refusal = choice.refusal(request.param, x, x)
    if refusal is not None:
        pytest.skip(refusal)
    with use_backend(request.param):
        yield gpu


def answer_of(p):
    """The whole layer through autograd, whose backward has a thread of its own for each GPU."""
    x, u, v, f = (t.clone().requires_grad_() for t in (p.x, p.scale_out, p.scale_in, p.shift))
    y = rescaled_linear(x, p.weight, u, v, p.bias, f)
    y.backward(p.dy)
    return Answer(y.detach(), x.grad, u.grad, v.grad, f.grad)


SHAPES = [(40, 48, 64, 3), (7, 33, 50, 1), (4, 64, 4096, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("current", [0, 1])
def test_tensors_on_another_gpu_than_the_current_one(on_gpu, current):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(current):
        for m, n, k, groups in SHAPES:
            for other in (1 - current, current):
                check(p := make_problem(m, n, k, groups, torch.bfloat16, device=f"cuda:{other}"), answer_of(p))
                assert torch.cuda.current_device() == current


@pytest.mark.gpu
def test_a_side_stream_waits_and_is_waited_for(on_gpu):
    """The stream waits for long first, so a launch on another stream would read what is not written yet."""
    for m, n, k, groups in SHAPES:
        p = make_problem(m, n, k, groups, torch.bfloat16, device=on_gpu)
        answer_of(p)  # compiled and loaded before
        exact, late = p.x.clone(), copy.copy(p)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late.x = torch.full_like(exact, float("nan"))
            torch.cuda._sleep(20_000_000)
            late.x.copy_(exact)
            got = answer_of(late)
        torch.cuda.current_stream().wait_stream(stream)
        check(p, got)


@pytest.mark.gpu
def test_memory_freed_on_a_side_stream_is_not_handed_out_too_early(on_gpu):
    """Workspaces and results come from the pool of the current stream, so nothing else gets them too early."""
    p = make_problem(4, 64, 4096, 1, torch.bfloat16, device=on_gpu)
    expected = answer_of(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        got = answer_of(p)
    # taken and overwritten on the main stream while the side stream has not begun
    for _ in range(64):
        torch.full((1 << 16,), float("nan"), device=on_gpu)
    torch.cuda.current_stream().wait_stream(stream)
    for name in ("y", "dx", "du", "dv", "df"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@pytest.mark.gpu
def test_a_training_step_through_make_graphed_callables_equals_eager(on_gpu):
    torch.manual_seed(0)
    eager = nn.Sequential(SSFLayerNorm(64), FusedRLRRLinear(64, 96, groups=3), nn.GELU(), FusedRLRRLinear(96, 64))
    eager.to(on_gpu)
    graphed = copy.deepcopy(eager)
    sample = torch.randn(40, 64, device=on_gpu, requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(graphed, (sample,))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (eager, graphed)]
    for _ in range(3):
        x = torch.randn(40, 64, device=on_gpu)
        for model, optimizer in zip((eager, graphed), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for (name, parameter), other in zip(eager.named_parameters(), graphed.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.gpu
def test_data_parallel_over_all_gpus_equals_one(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.manual_seed(0)
    layer = FusedRLRRLinear(64, 96, groups=3).to("cuda:0")
    x = torch.randn(40, 64, device="cuda:0")
    layer(x).square().sum().backward()
    exact = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    nn.DataParallel(layer)(x).square().sum().backward()
    for grad, p in zip(exact, (p for p in layer.parameters() if p.grad is not None), strict=True):
        # float32 sums, parted
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-3)
