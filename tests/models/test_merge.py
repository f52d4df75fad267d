"""merge, unmerge, merge_and_unload and disable_adapter on whole models."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import (
    FusedRLRRLinear,
    SSFAffine,
    SSFLayerNorm,
    apply_rlrr,
    disable_adapter,
    merge,
    merge_and_unload,
    unmerge,
)
from rlrr_kernels.models.merge import lost_updates
from tests.small_models import X, small_swin, small_vit, stir

MODELS = {"vit": small_vit, "swin": small_swin}


def tuned(make=small_vit, **options):
    return stir(apply_rlrr(make(), **options)).eval()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_merged_logits_agree_with_unmerged_and_unmerging_is_exact(make):
    model = tuned(make)
    logits, state = model(X), {n: p.clone() for n, p in model.state_dict().items()}
    frozen = {n: p for n, p in model.named_parameters() if n.endswith(("fc1.weight", "reduction.weight"))}
    assert merge(model) is model
    assert all(m.merged for m in model.modules() if isinstance(m, FusedRLRRLinear))
    with torch.no_grad():
        assert torch.allclose(model(X), logits, atol=1e-5)
    assert not torch.equal(model.get_submodule("norm").weight, state["norm.weight"] * 2)
    unmerge(model)
    assert torch.equal(model(X), logits)
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in frozen.items())
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())


def test_the_state_dict_of_a_merged_model_is_that_of_the_unmerged():
    model = tuned(small_swin)
    state = {n: p.clone() for n, p in model.state_dict().items()}
    merge(model)
    merged = model.state_dict()
    assert merged.keys() == state.keys()
    assert all(torch.equal(p, state[n]) for n, p in merged.items())
    with pytest.raises(RuntimeError, match="it is merged; unmerge before loading"):
        model.load_state_dict(state)
    unmerge(model)
    merge(model, keep=False)
    with pytest.raises(RuntimeError, match="frozen weight was not kept"):
        model.state_dict()


def test_without_a_kept_copy_unmerging_takes_reloaded_weights():
    model, plain = tuned(small_swin), small_swin().state_dict()
    logits = model(X)
    merge(model, keep=False)
    with pytest.raises(ValueError, match=r"base: expected layers.0.blocks.0.attn.qkv.weight, as merge\(keep=False\)"):
        unmerge(model)
    wrong = plain | {"layers.1.blocks.1.mlp.fc2.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"base: expected layers.1.blocks.1.mlp.fc2.weight \[48, 192\], got \[3, 3\]"):
        unmerge(model, wrong)
    assert all(m.merged for m in model.modules() if isinstance(m, FusedRLRRLinear))
    unmerge(model, plain)
    assert torch.equal(model(X), logits)
    assert model.layers[1].downsample.reduction.bias is None


def test_without_a_kept_copy_a_bias_must_come_back_too():
    model, plain = tuned(), small_vit().state_dict()
    merge(model, keep=False)
    without = {name: p for name, p in plain.items() if name != "blocks.1.mlp.fc1.bias"}
    with pytest.raises(ValueError, match=r"base: expected blocks.1.mlp.fc1.bias \[192\], got none"):
        unmerge(model, without)
    layer = model.blocks[0].mlp.fc1
    with pytest.raises(ValueError, match="bias: expected the frozen bias, got none"):
        layer.unmerge(layer.weight)
    unmerge(model, plain)
    bare = FusedRLRRLinear(4, 4, bias=False)
    bare.merge(keep=False)
    with pytest.raises(ValueError, match="bias: expected none, as the frozen layer has none, got one"):
        bare.unmerge(torch.zeros(4, 4), torch.zeros(4))


def test_a_disabled_layer_is_the_frozen_one_merged_or_not():
    layer, x = FusedRLRRLinear(8, 6), torch.randn(3, 8)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    layer.merge()
    layer.enabled = False
    assert torch.equal(layer(x), expected)
    model = tuned()
    with disable_adapter(model), pytest.raises(RuntimeError, match="switched off"):
        merge(model)
    gone = FusedRLRRLinear(8, 6)
    gone.merge(keep=False)
    gone.enabled = False
    with pytest.raises(RuntimeError, match="was not kept"):
        gone(x)


def test_a_merged_model_does_not_train():
    model = merge(tuned())
    model(X)  # evaluation needs no no_grad
    with pytest.raises(RuntimeError, match="would not train; unmerge first"):
        model.train()(X)


def test_merging_twice_and_unmerging_nothing_are_errors():
    model = tuned()
    with pytest.raises(RuntimeError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(RuntimeError, match="already merged"):
        merge(model)
    for function in (merge, merge_and_unload):
        with pytest.raises(ValueError, match="Linear holds no RLRR adapters"):
            function(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "convert", [lambda m: m.double(), copy.deepcopy, lambda m: m.to("meta").to_empty(device="cpu")]
)
def test_kept_weights_follow_the_model(convert):
    model = unmerge(convert(merge(tuned())))
    dtypes = {m.weight.dtype for m in model.modules() if isinstance(m, FusedRLRRLinear)}
    assert dtypes == {model.head.weight.dtype}
    assert model.blocks[0].mlp.fc1.weight.device.type == "cpu"
    assert model(X.to(model.head.weight.dtype)).shape == (2, 5)


def test_a_weight_tied_to_another_layer_is_not_touched():
    tied = nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), tied)
    model[0].weight = tied.weight
    before = tied.weight.clone()
    apply_rlrr(model, target_modules=["0"])
    merge(model)
    assert torch.equal(tied.weight, before)
    unmerge(model)
    assert model[0].weight is tied.weight


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_merge_and_unload_gives_the_plain_model(make):
    model = tuned(make)
    logits, before = model(X), make()(X)
    plain, classes = make(), {n: type(m) for n, m in make().named_modules()}
    assert merge_and_unload(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert not hasattr(model, "rlrr_config")
    assert all(n.startswith("head.") for n, p in model.named_parameters() if p.requires_grad)
    assert torch.allclose(model(X), logits, atol=1e-5)
    assert (logits - before).abs().max() > 0.01  # there was something to merge
    if make is small_vit:
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(X), model(X))
    else:  # patch merging had no bias
        missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
        assert (missing, unexpected) == ([], ["layers.1.downsample.reduction.bias"])
    apply_rlrr(model)  # as any plain model


def test_a_merged_model_unloads_too():
    model = tuned()
    logits = model(X)
    assert torch.allclose(merge_and_unload(merge(model))(X), logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_base_patch32_clip_224", {"depth": 1, "embed_dim": 96, "num_heads": 2}),  # no bias in the patch embedding
        ("vit_small_patch16_dinov3", {"depth": 1, "img_size": 32}),  # no bias in qkv
        ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 28}),  # q and v biases apart from qkv
    ],
)
def test_other_families_merge_right(name, options):
    torch.manual_seed(0)
    model = stir(apply_rlrr(timm.create_model(name, num_classes=3, **options))).double().eval()
    x = torch.randn(2, 3, *model.patch_embed.img_size).double()
    logits = model(x)
    assert torch.allclose(merge_and_unload(model)(x), logits, atol=1e-9)


def test_q_k_and_v_blocks_merge_with_their_own_v():
    model = tuned()
    layer = model.blocks[1].attn.qkv
    expected = torch.cat(
        [
            layer.weight[rows] * (1 + layer.scale_out[rows] * layer.scale_in[i])
            for i, rows in enumerate((slice(0, 48), slice(48, 96), slice(96, 144)))
        ]
    )
    bias = layer.bias + layer.shift
    merge_and_unload(model)
    assert torch.allclose(model.blocks[1].attn.qkv.weight, expected, atol=1e-6)
    assert torch.equal(model.blocks[1].attn.qkv.bias, bias)


def test_shared_and_bare_layers():
    shared = nn.Linear(4, 4)
    model = apply_rlrr(nn.Sequential(shared, nn.ReLU(), shared), target_modules=["*"])
    merge_and_unload(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]
    layer, x = FusedRLRRLinear(4, 4), torch.randn(2, 4)
    assert torch.allclose(merge_and_unload(layer)(x), layer(x), atol=1e-6)
    norm = SSFLayerNorm(4)
    assert torch.allclose(merge_and_unload(norm)(x), norm(x), atol=1e-6)


@pytest.mark.parametrize(
    "name", ["blocks.1.mlp.fc2.scale_in", "blocks.0.norm1.ssf_shift", "patch_embed.norm.ssf_scale"]
)
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(name):
    model = tuned()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float("inf")
    state = {n: p.clone() for n, p in model.state_dict().items()}
    for function in (merge, merge_and_unload):
        with pytest.raises(ValueError, match=f"safe_merge: {name.rpartition('.')[0]} would get values that are not"):
            function(model, safe_merge=True)
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())
    assert not any(m.merged for m in model.modules() if isinstance(m, FusedRLRRLinear))
    merge_and_unload(model)  # asked for without the check, it merges


@pytest.mark.parametrize(("size", "least", "most"), [(0.01, 0.2, 0.4), (0.001, 0.9, 1.0)])
def test_a_merge_that_rounding_undoes_warns_with_the_share(size, least, most):
    torch.manual_seed(0)
    layer = FusedRLRRLinear(256, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.scale_out.fill_(1.0)
        layer.scale_in.normal_(std=size)
    lost, changed = lost_updates(layer, layer.merged_weight()[0])
    there = layer.weight != 0  # what is zero stays zero, and loses nothing
    assert lost == int((there & (layer.to_linear().weight == layer.weight)).sum())
    assert changed == int(there.sum()) > 60_000
    assert least < lost / changed < most
    model = nn.Sequential(layer)
    with pytest.warns(UserWarning, match=rf"torch.bfloat16.*undoes the update of {lost / changed:.0%} of the weights"):
        merge(model)
    wide = FusedRLRRLinear(256, 256, init="identity")
    assert lost_updates(wide, wide.merged_weight()[0]) == (0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merge(tuned())
        merge(nn.Sequential(wide))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("merged", [False, True])
def test_disabled_it_is_the_base_model_bit_for_bit_head_included(make, merged):
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
def test_disabled_models_that_add_the_qkv_bias_apart_are_exact_too(name):
    torch.manual_seed(0)
    # PyTorch's attention takes another path where the position bias needs a gradient
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


def test_nested_blocks_put_back_what_was_there():
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
def test_disabled_with_rounded_weights_it_is_the_model_with_those(name):
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


def test_a_wrapped_model_is_the_model_inside():
    base, model = small_vit(), tuned()
    wrapped = torch.nn.DataParallel(model, device_ids=None) if torch.cuda.is_available() else Wrapper.of(model)
    with disable_adapter(wrapped):
        assert torch.equal(model(X), base(X))
    merge_and_unload(wrapped)
    assert not hasattr(model, "rlrr_config")


class Wrapper(nn.parallel.DataParallel):
    """DataParallel without a GPU."""

    @classmethod
    def of(cls, model):
        return cls(model)

    def forward(self, x):
        return self.module(x)


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
