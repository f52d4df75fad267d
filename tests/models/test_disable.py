"""disable_adapter: inside the block the model is its base model, bit for bit; afterwards it is what it was."""

import copy

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, apply_rlrr, disable_adapter, merge
from tests.small_models import X, small_swin, small_vit, stir, tuned


@pytest.mark.parametrize("make", [small_vit, small_swin])
@pytest.mark.parametrize("merged", [False, True])
def test_a_disabled_model_is_the_base_model_bit_for_bit_including_its_head(make, merged):
    base, model = make(), tuned(make)
    expected, features = base(X), base.forward_features(X)
    if merged:
        merge(model)
    logits = model(X)
    assert not torch.equal(logits, expected)
    with disable_adapter(model) as same:
        assert same is model
        assert torch.equal(model(X), expected)
        assert torch.equal(model.forward_features(X), features)
    assert torch.equal(model(X), logits)
    assert all(m.merged is merged for m in model.modules() if isinstance(m, FusedRLRRLinear))


def test_adapters_are_back_after_an_error_inside():
    model = tuned()
    logits = model(X)
    with pytest.raises(KeyError), disable_adapter(model):
        raise KeyError
    assert torch.equal(model(X), logits)
    assert all(m.enabled for m in model.modules() if isinstance(m, (FusedRLRRLinear, SSFLayerNorm, SSFAffine)))


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_models_that_add_the_qkv_bias_separately_are_exact_too(name):
    torch.manual_seed(0)
    # PyTorch's attention has another code path for a position bias that needs a gradient
    base = timm.create_model(name, depth=1, num_classes=3).eval().requires_grad_(False)
    x = torch.randn(1, 3, 224, 224)
    expected = base(x)
    model = stir(apply_rlrr(base))
    logits = model(x)
    with disable_adapter(model):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), logits)


def test_disabling_needs_adapters_and_the_kept_weights():
    with pytest.raises(ValueError, match="holds no RLRR adapters"), disable_adapter(nn.Linear(2, 2)):
        pass
    model = merge(tuned(), keep=False)
    with pytest.raises(RuntimeError, match="merged with keep=False"), disable_adapter(model):
        pass
    assert all(m.enabled for m in model.modules() if isinstance(m, SSFLayerNorm))


def test_nested_blocks_restore_what_they_found():
    torch.manual_seed(0)
    model = apply_rlrr(timm.create_model("beit_base_patch16_224", depth=1, num_classes=3))
    attention = model.blocks[0].attn
    with disable_adapter(model):
        with disable_adapter(model):
            pass
        assert attention.qkv_bias_separate is False
        assert attention.qkv.enabled is False
    assert attention.qkv_bias_separate is True


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_tiny_patch16_224"])
def test_with_frozen_dtype_the_base_model_has_rounded_weights(name):
    torch.manual_seed(0)
    options = {"depth": 1, "num_classes": 3}
    model = timm.create_model(name, **options).requires_grad_(False).eval()
    rounded = copy.deepcopy(model)
    apply_rlrr(model, frozen_dtype="bfloat16")
    for linear, layer in zip(rounded.modules(), model.modules(), strict=False):
        if isinstance(layer, FusedRLRRLinear):
            linear.weight.copy_(layer.weight)
            if layer.bias is not None:
                linear.bias.copy_(layer.bias)
    x = torch.randn(1, 3, 224, 224)
    with disable_adapter(model):
        assert torch.allclose(model(x), rounded(x), atol=1e-5)


def test_a_head_that_was_put_in_later_stays():
    model, base = tuned(), small_vit()
    model.reset_classifier(9)
    logits = model(X)
    with disable_adapter(model):
        assert model(X).shape == (2, 9)
        assert torch.equal(model.forward_features(X), base.forward_features(X))
    assert torch.equal(model(X), logits)
    one = tuned(lambda: small_vit(classes=1))
    one.reset_classifier(5)
    weight = one.head.weight.clone()
    with disable_adapter(one):
        assert torch.equal(one.head.weight, weight)
    model.reset_classifier(0)
    with disable_adapter(model):
        assert torch.equal(model.forward_features(X), base.forward_features(X))


def test_a_model_filled_after_it_was_prepared_without_data_can_be_disabled():
    with torch.device("meta"):
        model = apply_rlrr(small_vit())
    model.load_state_dict(apply_rlrr(small_vit()).state_dict(), assign=True)
    with disable_adapter(model.eval()):
        features = model.forward_features(X)
    assert torch.equal(features, small_vit().forward_features(X))
