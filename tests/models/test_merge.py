"""merge, unmerge and merge_and_unload on whole models, and what a merge gives to layers without a bias."""

import warnings

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, SSFLayerNorm, apply_rlrr, disable_adapter, merge, merge_and_unload, unmerge
from rlrr_kernels.models.merge import lost_updates
from tests.small_models import X, small_swin, small_vit, stir, tuned


@pytest.mark.parametrize("options", [{}, {"rank": 3, "scaling": 0.5}], ids=str)
@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_merged_logits_agree_with_unmerged_and_unmerging_is_exact(make, options):
    model = tuned(make, **options)
    logits, state = model(X), {n: p.clone() for n, p in model.state_dict().items()}
    frozen = {n: p for n, p in model.named_parameters() if n.endswith(("fc1.weight", "reduction.weight"))}
    assert merge(model) is model
    assert all(m.merged for m in model.modules() if isinstance(m, FusedRLRRLinear))
    with torch.no_grad():
        assert torch.allclose(model(X), logits, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(X), logits)
    now = dict(model.named_parameters())
    assert all(now[n] is p for n, p in frozen.items())
    assert all(torch.equal(p, state[n]) for n, p in model.state_dict().items())


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
    model(X)  # in evaluation mode gradients may be enabled
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


def test_kept_weights_move_with_the_model():
    model = unmerge(merge(tuned()).to("meta").to_empty(device="cpu"))
    assert model.blocks[0].mlp.fc1.weight.device.type == "cpu"


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


@pytest.mark.parametrize("make", [small_vit, small_swin])
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
    shared, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    model = apply_rlrr(nn.Sequential(shared, norm, shared, norm), target_modules=["*"], norm_affine=True)
    for linear, layer_norm in ((FusedRLRRLinear, SSFLayerNorm), (nn.Linear, nn.LayerNorm)):
        assert (type(model[0]), type(model[1])) == (linear, layer_norm)
        assert model[0] is model[2]
        assert model[1] is model[3]
        if linear is FusedRLRRLinear:
            merge_and_unload(model)
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
    merge_and_unload(model)  # without the check it merges


@pytest.mark.parametrize(("size", "least", "most"), [(0.01, 0.2, 0.4), (0.001, 0.9, 1.0)])
def test_a_merge_that_rounding_undoes_warns_with_the_share(size, least, most):
    torch.manual_seed(0)
    layer = FusedRLRRLinear(256, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.scale_out.fill_(1.0)
        layer.scale_in.normal_(std=size)
    lost, changed = lost_updates(layer, layer.merged_weight()[0])
    there = layer.weight != 0  # a weight of zero stays zero and loses nothing
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


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 32, "patch_size": 8}
WORDS = {"vocab_size": 9, "num_key_value_heads": 2}
TOKENS = torch.arange(6)[None]

#: (model, fields of its config, what is adapted, what the merge warns of or None)
BIASES = {
    "ViT with biases": ("ViT", IMAGES, "layers.*", None),
    "ViT's switch": ("ViT", IMAGES | {"qkv_bias": False}, "layers.*", None),
    "two switches of Llama": ("Llama", WORDS, "layers.*", None),
    "Llama's switch that governs others too": ("Llama", WORDS, "layers.*.q_proj", None),
    "no switch": ("Qwen2", WORDS, "layers.*", "layers.0.self_attn.o_proj.bias and 7 more tensors"),
    "one that has its bias": ("Qwen2", WORDS, "layers.*.v_proj", None),
}


@pytest.mark.parametrize(("kind", "options", "targets", "words"), BIASES.values(), ids=BIASES.keys())
def test_a_saved_merged_model_loads_whole_or_the_merge_warned(kind, options, targets, words, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **options)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    stir(apply_rlrr(model, target_modules=[targets], train_head=False))
    x = X if kind == "ViT" else TOKENS
    expected = model(x)[0].detach()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = merge_and_unload(merge(model))
    assert torch.allclose(plain(x)[0], expected, atol=1e-4)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)(x)[0]
    assert torch.allclose(again, expected, atol=1e-4) is (words is None)
    assert [f"merging gave {words} to layers that had none" in str(each.message) for each in caught] == [True] * (
        words is not None
    )


def test_added_biases_that_are_not_zero_are_warned_of_for_models_of_any_library():
    model = apply_rlrr(small_swin())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_and_unload(apply_rlrr(small_swin()))  # f is 0
    with pytest.warns(UserWarning, match=r"merging gave layers.1.downsample.reduction.bias to .*SwinTransformer"):
        merge_and_unload(stir(model))
    bare = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False))
    apply_rlrr(bare, target_modules=["0"], norm_affine=True)
    with pytest.warns(UserWarning, match=r"merging gave 1.weight and 1 more tensors to"):
        merge_and_unload(bare)


def merge_and_reload(model):
    base = {name: tensor.double() for name, tensor in small_vit().state_dict().items()}
    unmerge(merge(model, keep=False), base)


@pytest.mark.parametrize("change", [merge, merge_and_unload, merge_and_reload])
def test_what_was_merged_in_inference_mode_can_be_part_of_a_backward_pass(change):
    model, x = tuned().eval(), X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with torch.inference_mode():
        change(model)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    (got,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_layer_merged_in_inference_mode_passes_gradients_on():
    layer, x = FusedRLRRLinear(4, 3, init="paper").eval(), torch.ones(2, 4, requires_grad=True)
    with torch.inference_mode():
        plain = layer.to_linear()
        layer.merge()
    for module in (layer, plain):
        (got,) = torch.autograd.grad(module(x).sum(), x)
        assert torch.equal(got, layer.weight.sum(0).expand(2, 4))


@pytest.mark.parametrize("change", [merge, merge_and_unload])
def test_a_warning_of_a_merge_names_the_line_that_called_it(change):
    model = apply_rlrr(small_vit(), init="identity", frozen_dtype=torch.bfloat16)
    nn.init.constant_(model.blocks[0].mlp.fc1.scale_out, 1e-4)
    with pytest.warns(UserWarning, match="merging rounds") as caught:
        change(model)
    assert caught[0].filename == __file__
