"""SSFLayerNorm is the LayerNorm it replaces with a trained affine behind it; SSFAffine is that affine alone."""

import math

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels.layers.norm import SSFAffine, SSFLayerNorm
from tests.layers.test_norm_numerics import CLASSES, filled, formula


def test_it_is_a_layer_norm_with_the_same_arguments_and_keys():
    layer = SSFLayerNorm([8], 1e-3, True, False, "cpu", torch.float16)
    assert isinstance(layer, nn.LayerNorm)
    assert (layer.eps, layer.bias, layer.weight.dtype) == (1e-3, None, torch.float16)
    plain = filled(nn.LayerNorm(8))
    layer = SSFLayerNorm(8)
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["ssf_scale", "ssf_shift"], [])
    assert torch.equal(layer.weight, plain.weight)


def test_only_scale_and_shift_train_and_they_are_float32():
    for layer in (SSFLayerNorm(8, dtype=torch.bfloat16), SSFLayerNorm.from_layer_norm(nn.LayerNorm(8).bfloat16())):
        trained = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == {"ssf_scale": torch.float32, "ssf_shift": torch.float32}
    assert SSFLayerNorm(8, dtype=torch.float64).ssf_shift.dtype is torch.float64
    assert SSFLayerNorm.from_layer_norm(nn.LayerNorm(8).double()).ssf_scale.dtype is torch.float64


@pytest.mark.parametrize("make", [SSFLayerNorm, SSFAffine])
def test_the_papers_start_is_normal_around_one_and_zero(make):
    torch.manual_seed(0)
    layer = make(20_000)
    for values, mean in ((layer.ssf_scale, 1.0), (layer.ssf_shift, 0.0)):
        assert values.mean().item() == pytest.approx(mean, abs=5 * 0.02 / math.sqrt(20_000))
        assert values.std().item() == pytest.approx(0.02, rel=0.05)
    before = layer.ssf_scale.clone()
    layer.reset_affine()
    assert not torch.equal(layer.ssf_scale, before)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_identity_start_computes_the_frozen_layer(kind):
    plain = filled(kind(8))
    layer = SSFLayerNorm.from_layer_norm(plain, init="identity")
    x = torch.randn(3, 5, 8)
    assert torch.equal(layer(x), plain(x))


def test_a_callable_start_fills_both_in_place_once():
    calls = []

    def ones(scale, shift):
        calls.append(scale.device.type)
        scale.fill_(3.0)
        shift.fill_(2.0)

    layer = SSFLayerNorm.from_layer_norm(nn.LayerNorm(8), init=ones)
    assert calls == ["cpu"]
    assert torch.equal(layer.ssf_scale, torch.full((8,), 3.0))
    assert torch.equal(layer.ssf_shift, torch.full((8,), 2.0))
    assert "init=ones" in repr(layer)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_layer_norm_shares_and_freezes(kind, dtype):
    plain = kind(8, eps=0.25).to(dtype).eval()
    layer = SSFLayerNorm.from_layer_norm(plain)
    assert layer.weight is plain.weight
    assert layer.bias is plain.bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert not layer.training
    x = torch.randn(3, 8).to(dtype)
    assert layer(x).dtype is dtype
    s, t = layer.ssf_scale, layer.ssf_shift
    torch.testing.assert_close(layer(x), formula(x, layer.weight, layer.bias, s, t, 0.25), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("affine", "bias"), [(False, False), (True, False)])
def test_layers_without_weight_or_bias_keep_none_and_train_the_affine(affine, bias):
    plain = filled(nn.LayerNorm(8, elementwise_affine=affine, bias=bias))
    layer = SSFLayerNorm.from_layer_norm(plain)
    assert (layer.weight is None, layer.bias is None) == (not affine, True)
    x = torch.randn(4, 8)
    expected = plain(x) * layer.ssf_scale + layer.ssf_shift
    torch.testing.assert_close(layer(x), expected)
    twin = layer.to_layer_norm()
    assert twin.bias.data_ptr() != layer.ssf_shift.data_ptr()
    assert twin.weight.data_ptr() != layer.ssf_scale.data_ptr()
    torch.testing.assert_close(twin(x), expected)
    assert repr(layer).count("bias=False") == repr(plain).count("bias=False")


def test_meta_stays_meta():
    layer = SSFLayerNorm.from_layer_norm(nn.LayerNorm(8, device="meta"))
    assert layer.ssf_scale.is_meta
    assert layer(torch.empty(2, 8, device="meta")).shape == (2, 8)
    assert layer.to_layer_norm().weight.is_meta
    assert SSFAffine(8, "meta").ssf_scale.is_meta
    bare = nn.LayerNorm(8, elementwise_affine=False)
    assert SSFLayerNorm.from_layer_norm(bare, device="meta").ssf_shift.is_meta


@pytest.mark.parametrize(
    ("norm", "error", "words"),
    [
        (timm.layers.LayerNorm2d(8), TypeError, r"got timm\.layers\.norm\.LayerNorm2d"),
        (nn.BatchNorm1d(8), TypeError, "BatchNorm1d"),
        (SSFLayerNorm(8), TypeError, "SSFLayerNorm"),
        (nn.LayerNorm((4, 8)), ValueError, r"norm: expected a LayerNorm over one dimension, got \[4, 8\]"),
    ],
)
def test_other_layers_are_refused_and_not_changed(norm, error, words):
    with pytest.raises(error, match=words):
        SSFLayerNorm.from_layer_norm(norm)
    assert all(
        p.requires_grad for name, p in norm.named_parameters() if "ssf" in name or not isinstance(norm, SSFLayerNorm)
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SSFLayerNorm((4, 8)), ValueError, r"normalized_shape: expected one dimension, got \[4, 8\]"),
        (lambda: SSFLayerNorm(8, init="papr"), ValueError, "init: expected 'paper', 'identity' or a callable, got"),
        (lambda: SSFAffine(8, init="papr"), ValueError, "init: expected 'paper'"),
        (lambda: SSFLayerNorm(8)(torch.zeros(2, 7)), ValueError, r"x: expected shape \[..., 8\], got \[2, 7\]"),
        (lambda: SSFAffine(8)(torch.zeros(2, 1)), ValueError, r"x: expected shape \[..., 8\], got \[2, 1\]"),
        (lambda: SSFLayerNorm(8)(torch.zeros(())), ValueError, r"x: expected shape \[..., 8\], got \[\]"),
        (
            lambda: SSFLayerNorm(8)(torch.zeros(2, 8).int()),
            TypeError,
            "x: expected a floating-point tensor, got torch",
        ),
        (lambda: SSFLayerNorm(8)([1.0]), TypeError, "x: expected a floating-point tensor, got list"),
        (lambda: SSFLayerNorm(8)(torch.zeros(2, 8).double()), TypeError, "x: float64 goes with float64 only"),
        (lambda: SSFLayerNorm(8).double()(torch.zeros(2, 8)), TypeError, "x: float64 goes with float64 only"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("kind", CLASSES)
def test_to_layer_norm_gives_the_original_class_and_computes_the_same(kind):
    plain = filled(kind(8, eps=0.25))
    before = plain.weight.clone()
    layer = SSFLayerNorm.from_layer_norm(plain).eval()
    twin = layer.to_layer_norm()
    assert type(twin) is kind
    assert twin.eps == 0.25
    assert not twin.training
    assert sorted(twin.state_dict()) == ["bias", "weight"]
    x = torch.randn(5, 8)
    torch.testing.assert_close(twin(x), layer(x))
    nn.init.zeros_(twin.weight)
    assert torch.equal(layer.weight, before)


def test_a_narrow_weight_is_merged_in_float32_and_rounded_once():
    layer = SSFLayerNorm.from_layer_norm(filled(nn.LayerNorm(500)).bfloat16())
    nn.init.normal_(layer.ssf_shift)
    w, b, s, t = (p.detach().double() for p in (layer.weight, layer.bias, layer.ssf_scale, layer.ssf_shift))
    twin = layer.to_layer_norm()
    assert torch.equal(twin.weight, (w * s).float().bfloat16())
    # b s + t is rounded in float32 twice before it is rounded to bfloat16
    assert (twin.bias.double() - (b * s + t)).abs().div((b * s + t).abs()).max() < 2**-8
    assert (twin.bias == (b * s + t).float().bfloat16()).float().mean() > 0.99


def test_timms_fast_norm_is_kept():
    plain = timm.layers.LayerNorm(8)
    plain._fast_norm = True
    layer = SSFLayerNorm.from_layer_norm(plain)
    assert layer.to_layer_norm()._fast_norm
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is plain(x).dtype is torch.bfloat16
        layer.enabled = False
        assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_disabled_it_is_the_frozen_layer_bit_for_bit(kind, dtype):
    plain = filled(kind(48)).to(dtype)
    layer = SSFLayerNorm.from_layer_norm(plain)
    x = torch.randn(7, 48).to(dtype)
    assert not torch.equal(layer(x), plain(x))
    layer.enabled = False
    assert torch.equal(layer(x), plain(x))


def test_disabled_with_a_weight_stored_narrower_than_x():
    layer = SSFLayerNorm.from_layer_norm(plain := filled(nn.LayerNorm(48)).bfloat16())
    layer.enabled = False
    x = torch.randn(7, 48)
    assert torch.equal(layer(x), plain.float()(x))


def test_the_float32_class_computes_float64_in_float32_and_ignores_autocast():
    plain = filled(timm.layers.LayerNormFp32(48))
    layer = SSFLayerNorm.from_layer_norm(plain)
    x = torch.randn(7, 48)
    assert torch.equal(layer(x.double()), layer(x).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.float32
        assert layer(x.bfloat16()).dtype is torch.bfloat16


def test_repr_names_the_start_and_the_class():
    assert repr(SSFAffine(8)) == "SSFAffine(8, init=paper)"
    assert "init=identity" in repr(SSFLayerNorm(8, init="identity"))
    assert "base" not in repr(SSFLayerNorm(8))
    assert "base=timm.layers.norm.LayerNormFp32" in repr(SSFLayerNorm.from_layer_norm(timm.layers.LayerNormFp32(8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_affine_is_the_published_formula_formed_in_the_promoted_dtype(dtype):
    layer = SSFAffine(8)
    x = torch.randn(2, 3, 8).to(dtype)
    promoted = torch.promote_types(dtype, torch.float32)
    expected = torch.empty_like(x, dtype=promoted)
    for i in range(8):
        expected[..., i] = (
            (x[..., i : i + 1] * layer.ssf_scale[i : i + 1] + layer.ssf_shift[i : i + 1]).detach().squeeze(-1)
        )
    # formed in the promoted dtype, rounded once to x's: what follows in a 16-bit model takes nothing else
    torch.testing.assert_close(layer(x), expected.to(dtype), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    layer.enabled = False
    assert layer(x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_may_be_changed_in_place_as_nn_layer_norms_may(dtype):
    torch.manual_seed(0)
    norm, x = SSFLayerNorm(8, dtype=dtype), torch.randn(2, 3, 8, dtype=dtype)
    expected = norm(x).relu()
    y = torch.nn.functional.relu(norm(x), inplace=True)
    assert torch.equal(y, expected)
    gradients = [torch.autograd.grad(t.float().square().sum(), norm.ssf_scale)[0] for t in (y, expected)]
    assert torch.equal(*gradients)
