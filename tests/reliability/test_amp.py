"""Autocast, loss scaling, default and mixed dtypes: y is of x's dtype, each gradient of its parameter's."""

import itertools
from unittest import mock

import pytest
import torch

from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, apply_rlrr, rescaled_linear
from rlrr_kernels.backends import reference
from rlrr_kernels.layers import linear
from tests.oracle import assert_close, make_problem
from tests.small_models import X, small_vit, stir

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


def leaves(*dtypes, device="cpu", m=(3, 5), rank=1):
    """x ``[3, 5, K]`` and the parameters, W and b trained too."""
    p = make_problem(15, 12, 16, 3, rank=rank)
    tensors = [p.x.view(*m, 16), *p.forward_args[1:]]
    dtypes = dtypes or (torch.float32,) * 6
    return [t.to(device, d).detach().requires_grad_() for t, d in zip(tensors, dtypes, strict=True)]


def equal(got, expected):
    return [torch.equal(a, b) and a.dtype is b.dtype for a, b in zip(got, expected, strict=True)] == [True] * len(got)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_is_a_cast_of_x_wherever_backward_runs(device, half, rank):
    tensors = leaves(device=device, rank=rank)
    dy = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1)).to(device, half)
    cast = [tensors[0].detach().to(half).requires_grad_(), *tensors[1:]]
    expected = rescaled_linear(*cast)
    right = torch.autograd.grad(expected, cast, dy)
    with torch.autocast(device, half):
        y = rescaled_linear(*tensors)
        inside = torch.autograd.grad(y, tensors, dy, retain_graph=True)
        already = rescaled_linear(*cast)
    outside = torch.autograd.grad(y, tensors, dy)
    assert equal([y, already], [expected, expected])
    for got in (inside, outside):
        assert [g.dtype for g in got] == [torch.float32] * 6
        assert equal(got[1:], right[1:])
        assert torch.equal(got[0], right[0].float())


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_backward_in_a_region_that_forward_was_not_in_is_not_narrowed(device, half):
    tensors = leaves(device=device)
    y = rescaled_linear(*tensors)
    right = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    with torch.autocast(device, half):
        assert equal(torch.autograd.grad(y, tensors, torch.ones_like(y)), right)


def test_nested_and_disabled_regions_and_float64(device):
    tensors = leaves(device=device)
    plain = rescaled_linear(*tensors)
    with torch.autocast(device, torch.bfloat16):
        with torch.autocast(device, enabled=False):
            assert equal([rescaled_linear(*tensors)], [plain])
            with torch.autocast(device, torch.float16):
                assert rescaled_linear(*tensors).dtype is torch.float16
        with torch.autocast(device, torch.float16):
            assert rescaled_linear(*tensors).dtype is torch.float16
        assert rescaled_linear(*tensors).dtype is torch.bfloat16
        wide = [t.double() for t in tensors]
        assert rescaled_linear(*wide).dtype is torch.float64
    assert equal([rescaled_linear(*tensors)], [plain])


def test_autocasts_cache_of_weights_plays_no_part():
    tensors = leaves()
    weight = tensors[1]
    results = []
    for cached in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            before = rescaled_linear(*tensors)
            weight.mul_(2)
            results += [before, rescaled_linear(*tensors)]
            weight.mul_(0.5)
    assert equal(results[:2], results[2:])
    assert not torch.equal(results[0], results[1]), "the changed weight counts at once"


@pytest.mark.parametrize(
    ("x", "weight"), list(itertools.product([torch.float32, torch.float16, torch.bfloat16], repeat=2)), ids=str
)
def test_every_dtype_of_x_with_every_dtype_of_w(device, x, weight):
    tensors = leaves(x, weight, torch.float32, torch.float32, weight, torch.float32, device=device)
    y = rescaled_linear(*tensors)
    y.sum().backward()
    assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]
    assert_close("y", y, reference.formula(*tensors), reference.formula(*(t.double() for t in tensors)))


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [2, 3, 5], ids=["scale_out", "scale_in", "shift"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_trained_tensor_of_any_dtype_gets_its_gradient_in_it(x, narrow, dtype):
    dtypes = [x, *[torch.float32] * 5]
    dtypes[narrow] = dtype
    tensors = leaves(*dtypes)
    y = rescaled_linear(*tensors)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, tensors, dy)
    assert [g.dtype for g in got] == dtypes
    # formed wide, rounded once: the same call with that tensor widened
    wide = [t.float() if i == narrow else t for i, t in enumerate(tensors)]
    wide = [t.detach().requires_grad_() for t in wide]
    if dtype is not torch.float64:
        right = torch.autograd.grad(rescaled_linear(*wide), wide, dy)
        assert torch.equal(got[narrow], right[narrow].to(dtype))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_grad_scaler_scales_unscales_and_skips(device, half):
    torch.manual_seed(0)
    layer = FusedRLRRLinear(16, 12, groups=3, device=device)
    trained = [layer.scale_out, layer.scale_in, layer.shift]
    x = torch.randn(7, 16, device=device)

    def loss():
        with torch.autocast(device, half):
            return layer(x).float().square().mean()

    right = torch.autograd.grad(loss(), trained)
    optimizer = torch.optim.SGD(trained, 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    start = [p.detach().clone() for p in trained]
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    # a power of two: the scale leaves every digit as it was
    assert equal([p.grad for p in trained], right)
    scaler.step(optimizer)
    scaler.update()
    moved = [p.detach().clone() for p in trained]
    assert not any(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    optimizer.zero_grad()
    scaler.scale(loss() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert equal([p.detach() for p in trained], moved), "the step is skipped"
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_default_dtype_names_new_layers_and_changes_no_arithmetic(dtype):
    tensors = leaves()
    y = rescaled_linear(*tensors)
    right = [y, *torch.autograd.grad(y.sum(), tensors)]
    torch.set_default_dtype(dtype)
    try:
        y = rescaled_linear(*tensors)
        assert equal([y, *torch.autograd.grad(y.sum(), tensors)], right)
        layer, norm, affine = FusedRLRRLinear(8, 6), SSFLayerNorm(6), SSFAffine(6)
        out = affine(norm(layer(torch.randn(3, 8))))
        out.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert (layer.weight.dtype, norm.weight.dtype, out.dtype) == (dtype,) * 3
    trained = (layer.scale_out, layer.scale_in, layer.shift, norm.ssf_scale, norm.ssf_shift, affine.ssf_shift)
    assert {p.grad.dtype for p in trained} == {wide}


def test_the_default_device_is_where_new_layers_are_and_not_where_results_are():
    tensors = leaves()
    y = rescaled_linear(*tensors)
    right = [y, *torch.autograd.grad(y.sum(), tensors, create_graph=True)]
    norm, rows = SSFLayerNorm(16), torch.randn(3, 16).bfloat16()
    normed = norm(rows)
    torch.set_default_device("meta")
    try:
        y = rescaled_linear(*tensors)
        assert equal([y, *torch.autograd.grad(y.sum(), tensors, create_graph=True)], right)
        assert torch.equal(norm(rows), normed)
        layer = FusedRLRRLinear(8, 6)
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        out = layer(torch.randn(3, 8))
        out.sum().backward()
        assert (out.shape, layer.scale_out.grad.is_meta) == ((3, 6), True)
    finally:
        torch.set_default_device(None)


def _step(model, images, half=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        y = model(images)
    return y.detach().float(), [g.float() for g in torch.autograd.grad(y.float().square().sum(), trained)]


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_a_whole_vit_under_autocast_is_as_exact_as_the_plain_formula(half):
    model = stir(apply_rlrr(small_vit()))

    def plain(x, weight, u, v, bias, shift):
        return reference.formula(x, weight, u, v.view(-1, 1, v.shape[-1]), bias, shift)

    y, grads = _step(model, X, half)
    with mock.patch.object(linear, "rescaled_linear", plain):
        y_plain, grads_plain = _step(model, X, half)
    exact, grads_exact = _step(model.double(), X.double())
    # results of many roundings: twice the plain model's error, as everywhere, and one rounding of the half
    more = torch.finfo(half).eps
    assert_close("logits", y, y_plain, exact, more)
    flat = [torch.cat([g.flatten() for g in all_of]) for all_of in (grads, grads_plain, grads_exact)]
    assert_close("gradients", *flat, more)
