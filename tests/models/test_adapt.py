"""apply_rlrr on timm's families and on other models; what trains; optimiser groups."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import (
    FusedRLRRLinear,
    RLRRConfig,
    SSFAffine,
    SSFLayerNorm,
    apply_rlrr,
    count_parameters,
    merge_and_unload,
    param_groups,
    print_trainable_parameters,
)
from tests.small_models import X, small_swin, small_vit, stir


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def kinds(model, kind):
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_base_patch16_224", 288_768),
        ("vit_large_patch16_224", 765_952),
        ("vit_huge_patch14_224", 1_274_880),
        ("swin_base_patch4_window7_224", 358_144),
    ],
)
def test_published_counts(name, count):
    """ViT-B/16: u and v 165,888, f 82,944, block norms 36,864, final norm 1,536, patch 1,536."""
    assert count_parameters(apply_rlrr(on_meta(name, num_classes=0)))[0] == count


def test_published_counts_of_u_v_f_alone():
    model = apply_rlrr(on_meta("vit_base_patch16_224", num_classes=0), norm_affine=False, patch_affine=False)
    assert count_parameters(model)[0] == 165_888 + 82_944
    # one v on the fused qkv, which is not what is published
    shared = apply_rlrr(on_meta("vit_base_patch16_224", num_classes=0), groups={"*.qkv": 1})
    assert count_parameters(shared)[0] == 270_336


def test_every_block_linear_is_replaced_and_qkv_gets_three_groups():
    model = apply_rlrr(small_vit())
    replaced = {name: m.groups for name, m in model.named_modules() if isinstance(m, FusedRLRRLinear)}
    assert replaced == {
        f"blocks.{i}.{leaf}": 3 if leaf == "attn.qkv" else 1
        for i in range(2)
        for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert isinstance(model.patch_embed.proj, nn.Conv2d)
    assert kinds(model, SSFLayerNorm) == {"norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))}
    assert kinds(model, SSFAffine) == {"patch_embed.norm"}


def test_swin_is_adapted_as_published():
    """qkv in one group, patch merging without bias included; no affine after patch embedding and merging."""
    model = apply_rlrr(small_swin())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, FusedRLRRLinear)}
    assert {m.groups for m in linears.values()} == {1}
    assert linears["layers.1.downsample.reduction"].bias is None
    assert len(linears) == 4 * 4 + 1
    assert kinds(model, SSFLayerNorm) == {
        "norm",
        *(f"layers.{i}.blocks.{j}.norm{k}" for i in (0, 1) for j in (0, 1) for k in (1, 2)),
    }
    assert isinstance(apply_rlrr(small_swin(), patch_affine=True).patch_embed.norm, SSFLayerNorm)


FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"depth": 1}),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {"depth": 1}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 28}),
    "DINOv3": ("vit_small_patch16_dinov3", {"depth": 1, "img_size": 32}),
    "CLIP": ("vit_base_patch32_clip_224", {"depth": 1, "embed_dim": 96, "num_heads": 2}),
    "SigLIP": ("vit_base_patch16_siglip_224", {"depth": 1, "embed_dim": 96, "num_heads": 2}),
    "EVA-02": ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 28}),
    "BEiT": ("beit_base_patch16_224", {"depth": 1, "embed_dim": 96, "num_heads": 2}),
    "Swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)}),
    "Swin V2": ("swinv2_tiny_window8_256", {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_tensor_gets_a_gradient(family):
    """No layer is bypassed. EVA, BEiT and Swin V2 read qkv.weight themselves unless told otherwise."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model that could not be tried would warn in its first pass
        model = timm.create_model(name, num_classes=3, **options)
        for norm in kinds(model, nn.LayerNorm):
            nn.init.ones_(model.get_submodule(norm).weight)  # Swin V2 starts with zeros, which stop gradients
        apply_rlrr(model)
        size = model.pretrained_cfg["input_size"][1:] if "img_size" not in options else (options["img_size"],) * 2
        stir(model)(torch.randn(2, 3, *size)).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) > 12
    untouched = [n for n, p in trained if p.grad is None or not p.grad.any()]
    assert untouched == []


@pytest.mark.parametrize("family", ["EVA-02", "BEiT", "Swin V2"])
def test_a_model_that_bypasses_a_layer_is_refused_and_left_alone(family, monkeypatch):
    """As timm's older Swin V2, which cannot be told to call its qkv."""
    name, options = FAMILIES[family]
    model = timm.create_model(name, num_classes=3, **options)
    monkeypatch.setattr("rlrr_kernels.models.adapt.qkv_readers", lambda *_: [])
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"model: .* does not call .*attn\.qkv as modules.*exclude_modules"):
        apply_rlrr(model)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    apply_rlrr(model, exclude_modules=["*.qkv"])
    assert not any(n.endswith("qkv") for n in kinds(model, FusedRLRRLinear))


class Reads(nn.Module):
    """Multiplies by its layer's weight itself."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(nn.functional.linear(x, self.first.weight))


def test_a_bypass_in_any_model_is_refused_with_an_example_input():
    model = Reads()
    with pytest.raises(ValueError, match="Reads does not call first as modules"):
        apply_rlrr(model, target_modules=["*"], example_input=torch.zeros(2, 4))
    assert type(model.first) is nn.Linear
    with pytest.raises(ValueError, match="example_input: Reads cannot be run on it"):
        apply_rlrr(model, target_modules=["*"], example_input=torch.zeros(2, 5))
    apply_rlrr(model, target_modules=["second"], example_input=(torch.zeros(2, 4),))


@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_bypass_in_any_model_is_warned_of_once_in_the_first_training_pass(through):
    model = through(apply_rlrr(Reads(), target_modules=["*"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(torch.zeros(2, 4))
        with torch.no_grad():
            model.train()(torch.zeros(2, 4))
    with pytest.warns(UserWarning, match="in its first training pass Reads does not call first as modules"):
        model(torch.zeros(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(2, 4))
    assert not model._forward_hooks
    assert not model.second._forward_pre_hooks


@pytest.mark.parametrize("norm_affine", [False, True])
def test_pytorchs_encoder_layers_do_not_bypass_it_in_evaluation(norm_affine):
    """Their fast path reads the linears' and norms' weights, in evaluation alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 4, 16)
    apply_rlrr(model, target_modules=["*.linear1", "*.linear2"], norm_affine=norm_affine, example_input=x)
    trained = model.train()(x)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), trained, atol=1e-5)
        merge_and_unload(model)
        assert model.layers[0].activation_relu_or_gelu == 1
        assert torch.allclose(model(x), trained, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_sixteen_bit_models_run_and_train(make, dtype):
    model = apply_rlrr(make().to(dtype))
    expected = apply_rlrr(make().to(dtype)).float()
    expected.load_state_dict(model.state_dict())
    logits = model(X.to(dtype))
    assert logits.dtype is dtype
    assert torch.allclose(logits.float(), expected(X), atol=0.1)
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is p.dtype for p in model.parameters() if p.requires_grad)


def test_trying_the_model_computes_nothing_and_changes_nothing():
    """Its buffers, and whatever its code keeps between calls, stay as they were."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 4), 0
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return self.layer(x)

    model = apply_rlrr(Counts(), target_modules=["layer"], example_input=torch.zeros(2, 4))
    assert (model.calls, model.seen.item()) == (0, 0.0)


def test_only_scales_shifts_affines_and_head_train():
    model = apply_rlrr(small_vit())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n.rpartition(".")[2] for n in trained} == {
        "scale_out",
        "scale_in",
        "shift",
        "ssf_scale",
        "ssf_shift",
        "weight",
        "bias",
    }
    assert {n for n in trained if n.rpartition(".")[2] in ("weight", "bias")} == {"head.weight", "head.bias"}
    without = apply_rlrr(small_vit(), train_head=False)
    assert {n for n, p in without.named_parameters() if p.requires_grad} == trained - {"head.weight", "head.bias"}


def test_identity_init_leaves_the_models_function():
    plain = small_vit()(X)
    assert torch.equal(apply_rlrr(small_vit(), init="identity")(X), plain)
    assert not torch.equal(apply_rlrr(small_vit(), init="paper")(X), plain)


def test_config_and_options():
    config = RLRRConfig(exclude_modules=("blocks.1.*", "norm"), init="identity")
    model = apply_rlrr(small_vit(), config, patch_affine=False)
    assert kinds(model, FusedRLRRLinear) == {f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert kinds(model, SSFLayerNorm) == {"blocks.0.norm1", "blocks.0.norm2"}
    assert not kinds(model, SSFAffine)
    assert model.rlrr_config == RLRRConfig(exclude_modules=("blocks.1.*", "norm"), init="identity", patch_affine=False)
    assert not kinds(apply_rlrr(small_vit(), norm_affine=False), SSFLayerNorm)
    parent = apply_rlrr(small_vit(), exclude_modules=["blocks.0", "patch_embed"])
    assert {name[:8] for name in kinds(parent, (FusedRLRRLinear, SSFLayerNorm, SSFAffine))} == {"blocks.1", "norm"}
    named = apply_rlrr(small_vit(), target_modules=["blocks.0.mlp.fc1"])
    assert not kinds(named, SSFLayerNorm) | kinds(named, SSFAffine)
    assert len(kinds(apply_rlrr(small_vit(), target_modules="blocks.0.mlp.fc1", norm_affine=True), SSFLayerNorm)) == 5


def test_frozen_weights_in_bfloat16():
    model = apply_rlrr(small_vit(), frozen_dtype="bfloat16")
    layer = model.blocks[0].mlp.fc1
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (layer.scale_out.dtype, model.patch_embed.proj.weight.dtype) == (torch.float32, torch.float32)
    assert torch.equal(layer.weight, small_vit().blocks[0].mlp.fc1.weight.bfloat16())
    assert model(X).dtype is torch.float32


def test_the_trained_model_loads_a_plain_checkpoint():
    plain, model = small_vit(), apply_rlrr(small_vit())
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    trained = {"scale_out", "scale_in", "shift", "ssf_scale", "ssf_shift"}
    assert {name.rpartition(".")[2] for name in missing} == trained


def test_both_heads_of_a_distilled_model_train():
    model = apply_rlrr(timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=3))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "head" in n} == {
        "head.weight",
        "head.bias",
        "head_dist.weight",
        "head_dist.bias",
    }


def test_a_replaced_head_keeps_its_frozen_weight():
    model = apply_rlrr(small_vit(), target_modules=["head"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.scale_out",
        "head.scale_in",
        "head.shift",
    }


def test_a_layer_used_twice_stays_one_layer():
    shared, norm = nn.Linear(4, 4), nn.LayerNorm(4)
    model = apply_rlrr(nn.Sequential(shared, norm, shared, norm), target_modules=["*"], norm_affine=True)
    assert isinstance(model[0], FusedRLRRLinear)
    assert isinstance(model[1], SSFLayerNorm)
    assert model[0] is model[2]
    assert model[1] is model[3]


def test_named_targets_on_any_model():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6)), nn.Linear(6, 2))
    apply_rlrr(model, target_modules=["0", "2.*"], groups={"0": 2})
    assert [type(m).__name__ for m in (model[0], model[2][0], model[3])] == [
        "FusedRLRRLinear",
        "FusedRLRRLinear",
        "Linear",
    ]
    assert (model[0].groups, model[2][0].groups) == (2, 1)
    assert not model[3].weight.requires_grad
    apply_rlrr(single := nn.Sequential(nn.Linear(4, 4)), target_modules="0")
    assert isinstance(single[0], FusedRLRRLinear)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (
            {"target_modules": ["blocks.*", "blocks.*.fc3"]},
            ValueError,
            r"target_modules: 'blocks.\*.fc3' matches no nn.L",
        ),
        (
            {"exclude_modules": ["blocks.7.*"]},
            ValueError,
            r"exclude_modules: 'blocks.7.\*' matches nothing",
        ),
        ({"exclude_modules": ["blocks.*"]}, ValueError, "target_modules: they leave no nn.Linear"),
        ({"exclude_modules": ["head"]}, ValueError, "exclude_modules: 'head' matches nothing that would be adapted"),
        ({"groups": {"*.qkv": 5}}, ValueError, "groups: 5 does not divide the 144 rows of blocks.0.attn.qkv"),
        ({"groups": {"*.fc9": 2}}, ValueError, r"groups: '\*.fc9' matches no adapted nn.Linear"),
        ({"lr": 1}, TypeError, "lr"),
    ],
)
def test_bad_options_name_themselves_and_change_nothing(options, kind, words):
    model = small_vit()
    with pytest.raises(kind, match=words):
        apply_rlrr(model, **options)
    assert not kinds(model, (FusedRLRRLinear, SSFLayerNorm, SSFAffine))
    assert all(p.requires_grad for p in model.parameters())


def test_bad_models_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"expected a ViT, EVA, BEiT or Swin of timm, got Sequential.*target_modules"):
        apply_rlrr(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"matches no nn\.Linear"):
        apply_rlrr(nn.Linear(4, 4), target_modules="*")
    with pytest.raises(ValueError, match="already holds RLRR adapters"):
        apply_rlrr(apply_rlrr(small_vit()))
    with pytest.raises(TypeError, match="config: expected an RLRRConfig, got list"):
        apply_rlrr(small_vit(), ["blocks.*"])
    with pytest.raises(ValueError, match=r"patch_affine: Sequential has no patch_embed\.norm"):
        apply_rlrr(nn.Sequential(nn.Linear(4, 4)), target_modules="*", patch_affine=True)


def test_a_layer_norm_that_has_no_affine_is_named_with_the_way_out():
    """convnext's over channels, and one over two dimensions; those that are named stay frozen."""
    norms = timm.layers.LayerNorm2d(4), nn.LayerNorm((4, 4))
    odd = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*norms), nn.LayerNorm(4))
    with pytest.raises(TypeError, match=r"^1\.0: .*LayerNorm2d\. Name 1\.0, 1\.1 in exclude_modules"):
        apply_rlrr(odd, target_modules="0", norm_affine=True)
    with pytest.raises(ValueError, match=r"^1\.1: .* one dimension, got \[4, 4\]\. Name 1\.1 in exclude_modules"):
        apply_rlrr(odd, target_modules="0", norm_affine=True, exclude_modules=["1.0"])
    assert type(odd[0]) is nn.Linear
    apply_rlrr(odd, target_modules="0", norm_affine=True, exclude_modules=["1.*"])
    assert kinds(odd, SSFLayerNorm) == {"2"}
    assert not any(p.requires_grad for p in odd[1].parameters())


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.BatchNorm1d, timm.layers.RmsNorm])
def test_norms_of_other_kinds_get_no_affine_and_are_warned_of(norm):
    def model():
        return nn.Sequential(nn.Linear(4, 4), norm(4), nn.LayerNorm(4), norm(4))

    with pytest.warns(UserWarning, match="norm_affine: no affine after 1, 3, which are norms but no LayerNorm"):
        made = apply_rlrr(model(), target_modules="0", norm_affine=True)
    assert kinds(made, SSFLayerNorm) == {"2"}
    assert not made[1].weight.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_rlrr(model(), target_modules="0", norm_affine=True, exclude_modules=["1", "3"])
        apply_rlrr(model(), target_modules="0")
    with pytest.warns(UserWarning, match=r"no affine after blocks\.0\.norm1, blocks\.0\.norm2, .* and 2 more"):
        apply_rlrr(small_vit(norm_layer=timm.layers.RmsNorm))  # where the published method has them


def test_weight_decay_falls_on_what_the_published_code_decays():
    model = apply_rlrr(small_vit())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, plain = param_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    given = {names[id(p)] for p in decayed["params"]}
    assert {n.rpartition(".")[2] for n in given if n.startswith("blocks.")} == {"scale_out", "scale_in"}
    assert {n for n in given if not n.startswith("blocks.")} == {
        "head.weight",
        "patch_embed.norm.ssf_scale",
        "patch_embed.norm.ssf_shift",
    }
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
