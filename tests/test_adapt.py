"""apply_rlrr on timm models and on others; merging back; optimiser groups."""

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import (
    FusedRLRRLinear,
    apply_rlrr,
    count_parameters,
    merge_model,
    param_groups,
    print_trainable_parameters,
)


def small_vit(classes=5):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=classes
    ).eval()


X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "count"), [("vit_base_patch16_224", 248_832), ("vit_large_patch16_224", 663_552)])
def test_published_counts_of_u_v_f(name, count):
    """ViT-B/16: u and v 165,888 and f 82,944, with a v each for q, k and v."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    assert count_parameters(apply_rlrr(model))[0] == count


def test_every_block_linear_is_replaced_and_qkv_gets_three_groups():
    model = apply_rlrr(small_vit())
    replaced = {name: m.groups for name, m in model.named_modules() if isinstance(m, FusedRLRRLinear)}
    assert replaced == {
        f"blocks.{i}.{leaf}": 3 if leaf == "attn.qkv" else 1
        for i in range(2)
        for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert isinstance(model.patch_embed.proj, nn.Conv2d)


def test_only_scales_shifts_and_head_train():
    model = apply_rlrr(small_vit())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained if n.startswith("blocks.")} == {"scale_out", "scale_in", "shift"}
    assert {n for n in trained if not n.startswith("blocks.")} == {"head.weight", "head.bias"}
    assert not {n for n, p in apply_rlrr(small_vit(), train_head=False).named_parameters() if p.requires_grad} & {
        "head.weight",
        "head.bias",
    }


def test_every_trained_tensor_gets_a_gradient():
    """No layer is bypassed, as SwinV2's and BEiT's qkv would be."""
    model = apply_rlrr(small_vit())
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_identity_init_leaves_the_models_function():
    plain = small_vit()(X)
    assert torch.equal(apply_rlrr(small_vit(), init="identity")(X), plain)
    assert not torch.equal(apply_rlrr(small_vit(), init="paper")(X), plain)


def test_merge_model_gives_back_a_plain_timm_model_with_the_same_logits():
    model = apply_rlrr(small_vit())
    for module in model.modules():
        if isinstance(module, FusedRLRRLinear):
            nn.init.normal_(module.shift, std=0.1)
    logits, before = model(X), small_vit()(X)
    merged = merge_model(model)
    assert not any(isinstance(m, FusedRLRRLinear) for m in merged.modules())
    assert torch.allclose(merged(X), logits, atol=1e-5)
    assert (logits - before).abs().max() > 0.01  # there was something to merge
    fresh = small_vit()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(X), merged(X))


def test_the_trained_model_loads_a_plain_checkpoint():
    plain, model = small_vit(), apply_rlrr(small_vit())
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {name.rpartition(".")[2] for name in missing} == {"scale_out", "scale_in", "shift"}


def test_both_heads_of_a_distilled_model_train():
    model = apply_rlrr(timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=3))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "head" in n} == {
        "head.weight",
        "head.bias",
        "head_dist.weight",
        "head_dist.bias",
    }


def test_a_replaced_head_keeps_its_frozen_weight():
    model = apply_rlrr(small_vit(), ["head"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.scale_out",
        "head.scale_in",
        "head.shift",
    }


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = apply_rlrr(nn.Sequential(shared, nn.ReLU(), shared), ["*"])
    assert isinstance(model[0], FusedRLRRLinear)
    assert model[0] is model[2]
    merge_model(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]


def test_a_bare_layer():
    layer = FusedRLRRLinear(4, 4)
    x = torch.randn(2, 4)
    assert torch.allclose(merge_model(layer)(x), layer(x), atol=1e-6)
    with pytest.raises(ValueError, match=r"matches no nn\.Linear"):
        apply_rlrr(nn.Linear(4, 4), "*")


def test_named_targets_on_any_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 2))
    apply_rlrr(model, ["0", "2.*"])
    assert [type(m).__name__ for m in (model[0], model[2][0], model[3])] == [
        "FusedRLRRLinear",
        "FusedRLRRLinear",
        "Linear",
    ]
    assert not model[3].weight.requires_grad
    apply_rlrr(single := nn.Sequential(nn.Linear(4, 4)), "0")
    assert isinstance(single[0], FusedRLRRLinear)


def test_a_model_of_unknown_kind_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"expected a timm VisionTransformer, got Sequential.*target_modules.*SwinV2"):
        apply_rlrr(nn.Sequential(nn.Linear(4, 4)))


def test_swinv2_is_refused():
    with torch.device("meta"):
        model = timm.create_model("swinv2_tiny_window8_256")
    with pytest.raises(TypeError, match="got SwinTransformerV2"):
        apply_rlrr(model)


def test_a_pattern_that_matches_nothing_changes_nothing():
    model = small_vit()
    with pytest.raises(ValueError, match=r"target_modules: 'blocks.\*.fc3' matches no nn.Linear"):
        apply_rlrr(model, ["blocks.*", "blocks.*.fc3"])
    assert not any(isinstance(m, FusedRLRRLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_applying_twice_is_an_error():
    with pytest.raises(ValueError, match="already holds FusedRLRRLinear"):
        apply_rlrr(apply_rlrr(small_vit()))


def test_weight_decay_falls_on_scales_and_head_weight_alone():
    model = apply_rlrr(small_vit())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = param_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    leaf = {names[id(p)].rpartition(".")[2] for p in decayed["params"]}
    assert leaf == {"scale_out", "scale_in", "weight"}
    assert {names[id(p)].rpartition(".")[2] for p in plain["params"]} == {"shift", "bias"}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


def test_full_fine_tuning_does_not_decay_norms_and_positions():
    model = small_vit()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in param_groups(model, 0.05)[0]["params"]}
    assert "blocks.0.attn.qkv.weight" in decayed
    assert not {n for n in decayed if "norm" in n or n.endswith("bias") or n in ("pos_embed", "cls_token")}


def test_print_trainable_parameters(capsys):
    model = apply_rlrr(small_vit())
    print_trainable_parameters(model)
    trainable, total = count_parameters(model)
    assert capsys.readouterr().out == (
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}\n"
    )
