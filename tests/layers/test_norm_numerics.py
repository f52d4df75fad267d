"""Numerics of SSFLayerNorm: accuracy, saved tensors, derivatives, autocast, opcheck."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from rlrr_kernels import use_backend
from rlrr_kernels.backends import choice
from rlrr_kernels.layers.norm import SSFLayerNorm
from rlrr_kernels.ops import layer_norm
from rlrr_kernels.ops.layer_norm import _AffineLayerNorm
from tests.oracle import Answer, assert_close, require

BACKENDS = ["reference", "triton"]
CLASSES = [nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNormFp32]


def filled(norm):
    """The layer with random weight and bias."""
    for p in norm.parameters():
        nn.init.normal_(p, 1.0, 0.5)
    return norm


def formula(x, weight, bias, scale, shift, eps):
    """As in the published code of SSF and RLRR, in x's dtype."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    return (F.layer_norm(x, x.shape[-1:], weight, bias, eps) * scale + shift).to(x.dtype)


def differentiate(x, dy, weight, bias, scale, shift, eps, dtype, wide):
    """The formula and its gradients with x and dy in ``dtype``, s and t in ``wide``; the field df is not used."""
    x = x.detach().to(dtype).requires_grad_()
    scale, shift = (p.detach().to(wide).requires_grad_() for p in (scale, shift))
    weight, bias = (None if p is None else p.detach().to(wide) for p in (weight, bias))
    y = formula(x, weight, bias, scale, shift, eps)
    dx, ds, dt = torch.autograd.grad(y, (x, scale, shift), dy.to(dtype))
    return Answer(y.detach(), dx, ds, dt, dt)


def check(got, x, dy, weight, bias, scale, shift, eps):
    """Hold y, dx, ds and dt to the yardstick; ds and dt are float32 for any x."""
    arguments = x, dy, weight, bias, scale, shift, eps
    exact = differentiate(*arguments, torch.float64, torch.float64)
    plain = differentiate(*arguments, x.dtype, torch.float32)
    plain_wide = differentiate(*arguments, torch.float32, torch.float32)
    for name in ("y", "dx"):
        assert_close(name, getattr(got, name), getattr(plain, name), getattr(exact, name))
    for name in ("du", "dv"):
        assert_close(name, getattr(got, name), getattr(plain_wide, name), getattr(exact, name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients_are_as_exact_as_the_plain_formula(backend, weight_dtype, dtype):
    device = require(backend, dtype)
    torch.manual_seed(0)
    layer = SSFLayerNorm.from_layer_norm(filled(nn.LayerNorm(96)).to(device, weight_dtype))
    nn.init.normal_(layer.ssf_scale)
    nn.init.normal_(layer.ssf_shift)
    # strided, with a large mean: the variance must not be a difference of large numbers
    x = (torch.randn(3, 96, 11, device=device) + 30).to(dtype).mT.requires_grad_()
    dy = torch.randn(3, 11, 96, device=device).to(dtype)
    with use_backend(backend):
        y = layer(x)
        dx, ds, dt = torch.autograd.grad(y, (x, layer.ssf_scale, layer.ssf_shift), dy)
    answer = Answer(y.detach(), dx, ds, dt, dt)
    check(answer, x, dy, layer.weight, layer.bias, layer.ssf_scale, layer.ssf_shift, layer.eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_saved_for_backward_is_what_layer_norm_saves(backend, dtype):
    device = require(backend, dtype)
    rows, d = 200, 16

    def kept(norm):
        saved = []
        x = torch.randn(2, rows // 2, d, device=device, dtype=dtype, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y = norm(x)
            y.sum().backward()
        activations = [t for t in saved if t.numel() >= rows]
        assert all(t.data_ptr() == x.data_ptr() for t in activations if t.numel() >= rows * d)
        return sorted((t.numel(), str(t.dtype)) for t in activations)

    plain = nn.LayerNorm(d, device=device)  # float32 parameters: its mean and deviation are float32 too
    if dtype is not torch.float32 and device == "cuda":
        plain = plain.to(dtype)
    expected = kept(plain)
    assert [n for n, _ in expected] == [rows, rows, rows * d]
    with use_backend(backend):
        assert kept(SSFLayerNorm.from_layer_norm(plain)) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (2, 3, 4, 8)])
def test_any_leading_shape(backend, shape):
    layer = SSFLayerNorm(8, device=require(backend))
    x = torch.randn(shape, device=layer.weight.device, requires_grad=True)
    with use_backend(backend):
        y = layer(x)
        assert y.shape == shape
        y.sum().backward()
    assert x.grad.shape == shape
    assert torch.isfinite(layer.ssf_scale.grad).all()
    torch.testing.assert_close(layer.ssf_shift.grad, torch.full_like(layer.ssf_shift, x.numel() // 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_not_needed_are_not_computed(backend, monkeypatch):
    layer = SSFLayerNorm(8, device=require(backend))
    asked = []
    passes = choice.load(backend)
    backward = passes.layer_norm_backward
    monkeypatch.setattr(passes, "layer_norm_backward", lambda *args: asked.append(args[-1]) or backward(*args))
    with use_backend(backend):
        x = torch.randn(3, 8, device=layer.weight.device)
        layer(x).sum().backward()  # a first layer: x needs no gradient
        assert layer.ssf_scale.grad is not None
        layer.requires_grad_(False)
        assert not layer(x).requires_grad
    assert asked == [False]


def parts(d, dtype):
    return [p.to(dtype).requires_grad_() for p in (torch.randn(d), torch.randn(d), 1 + torch.rand(d), torch.randn(d))]


@pytest.mark.parametrize("trained", ["affine", "everything"])
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, False)])
def test_the_functions_first_and_second_derivatives_are_right(present, trained):
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    w, b, s, t = parts(6, torch.float64)
    w, b = (p if there else None for p, there in zip((w, b), present, strict=True))
    if trained == "affine":
        for p in (w, b):
            if p is not None:
                p.requires_grad_(False)

    def function(x, w, b, s, t):
        return _AffineLayerNorm.apply(x, w, b, s, t, 1e-3, torch.float64)

    assert torch.allclose(function(x, w, b, s, t), formula(x, w, b, s, t, 1e-3))
    assert torch.autograd.gradcheck(function, (x, w, b, s, t))
    assert torch.autograd.gradgradcheck(function, (x, w, b, s, t))


@pytest.mark.triton
def test_second_derivatives_through_the_kernels_are_those_of_plain_pytorch():
    device = require("triton")
    layer = SSFLayerNorm(12, device=device)
    x = torch.randn(5, 12, device=device, requires_grad=True)
    second = {}
    for backend in BACKENDS:
        with use_backend(backend):
            dx, ds = torch.autograd.grad(layer(x).square().sum(), (x, layer.ssf_scale), create_graph=True)
            second[backend] = torch.autograd.grad(dx.square().sum() + ds.square().sum(), (x, layer.ssf_scale))
    for plain, ours in zip(*second.values(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_autocast_on_the_cpu_leaves_the_dtype_as_layer_norm_does():
    layer, plain = SSFLayerNorm(8), nn.LayerNorm(8)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 8).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype is plain(x).dtype is dtype


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_on_a_gpu_gives_the_frozen_layers_dtype(gpu, backend, dtype, kind):
    plain = filled(kind(64)).to(gpu)
    layer = SSFLayerNorm.from_layer_norm(plain)
    x = torch.randn(3, 64, device=gpu, dtype=dtype, requires_grad=True)
    with use_backend(backend), torch.autocast(gpu, torch.bfloat16):
        y = layer(x)
        assert y.dtype is plain(x).dtype
    y.sum().backward()
    assert x.grad.dtype is dtype
    expected = (F.layer_norm(x.float(), (64,), plain.weight, plain.bias, plain.eps) * layer.ssf_scale) + layer.ssf_shift
    torch.testing.assert_close(y, expected.to(y.dtype))


@pytest.mark.parametrize(
    ("backend", "dtype", "out"),
    [("reference", torch.float64, torch.float64), ("triton", torch.bfloat16, torch.float32)],
    ids=str,
)
def test_opcheck(backend, dtype, out):
    device = require(backend, dtype)
    x, dy = (torch.randn(5, 8, device=device).to(dtype) for _ in range(2))
    w, b, s, t = (p.detach().to(device) for p in parts(8, out))
    fast = ("test_schema", "test_autograd_registration", "test_faketensor")
    with use_backend(backend):
        for own, which in (((w, b), (*fast, "test_aot_dispatch_dynamic")), ((None, None), fast)):
            torch.library.opcheck(layer_norm.layer_norm, (x, *own, s, t, 1e-6, out), test_utils=which)
            _, mean, rstd = layer_norm.layer_norm(x, *own, s, t, 1e-6, out)
            for need_x in (True, False):
                torch.library.opcheck(
                    layer_norm.layer_norm_backward, (dy, x, mean, rstd, *own, s, need_x), test_utils=fast
                )


def test_fake_tensors_of_a_gpu_pass_where_there_is_none(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def asks_the_device(x):
        raise AssertionError("the choice belongs behind the dispatcher, where fake tensors do not come")

    monkeypatch.setattr(choice, "module_for_layer_norm", asks_the_device)
    with FakeTensorMode():
        layer = SSFLayerNorm(8, device="cuda")
        for dtype in (torch.float32, torch.bfloat16):
            y = layer(torch.empty(2, 3, 8, device="cuda", dtype=dtype))
            assert (y.shape, y.dtype, y.device.type) == ((2, 3, 8), dtype, "cuda")
