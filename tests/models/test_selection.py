"""Which modules of a model are selected: as published for timm's families, by patterns, and what is refused."""

import warnings

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, RLRRConfig, SSFAffine, SSFLayerNorm, apply_rlrr, count_parameters
from tests.small_models import names_of, small_swin, small_vit


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


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
    # one v for the fused qkv, which differs from the published method
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
    assert names_of(model, SSFLayerNorm) == {"norm", *(f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2))}
    assert names_of(model, SSFAffine) == {"patch_embed.norm"}


def test_swin_is_adapted_as_published():
    """qkv in one group, patch merging without bias included; no affine after patch embedding and merging."""
    model = apply_rlrr(small_swin())
    linears = {n: m for n, m in model.named_modules() if isinstance(m, FusedRLRRLinear)}
    assert {m.groups for m in linears.values()} == {1}
    assert linears["layers.1.downsample.reduction"].bias is None
    assert len(linears) == 4 * 4 + 1
    assert names_of(model, SSFLayerNorm) == {
        "norm",
        *(f"layers.{i}.blocks.{j}.norm{k}" for i in (0, 1) for j in (0, 1) for k in (1, 2)),
    }
    assert isinstance(apply_rlrr(small_swin(), patch_affine=True).patch_embed.norm, SSFLayerNorm)


def test_config_and_options():
    config = RLRRConfig(exclude_modules=("blocks.1.*", "norm"), init="identity")
    model = apply_rlrr(small_vit(), config, patch_affine=False)
    assert names_of(model, FusedRLRRLinear) == {
        f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert names_of(model, SSFLayerNorm) == {"blocks.0.norm1", "blocks.0.norm2"}
    assert not names_of(model, SSFAffine)
    assert model.rlrr_config == RLRRConfig(exclude_modules=("blocks.1.*", "norm"), init="identity", patch_affine=False)
    assert not names_of(apply_rlrr(small_vit(), norm_affine=False), SSFLayerNorm)
    parent = apply_rlrr(small_vit(), exclude_modules=["blocks.0", "patch_embed"])
    assert {name[:8] for name in names_of(parent, (FusedRLRRLinear, SSFLayerNorm, SSFAffine))} == {"blocks.1", "norm"}
    named = apply_rlrr(small_vit(), target_modules=["blocks.0.mlp.fc1"])
    assert not names_of(named, SSFLayerNorm) | names_of(named, SSFAffine)
    assert (
        len(names_of(apply_rlrr(small_vit(), target_modules="blocks.0.mlp.fc1", norm_affine=True), SSFLayerNorm)) == 5
    )


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
    assert not names_of(model, (FusedRLRRLinear, SSFLayerNorm, SSFAffine))
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
    assert names_of(odd, SSFLayerNorm) == {"2"}
    assert not any(p.requires_grad for p in odd[1].parameters())


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.BatchNorm1d, timm.layers.RmsNorm])
def test_norms_of_other_kinds_get_no_affine_and_are_warned_of(norm):
    def model():
        return nn.Sequential(nn.Linear(4, 4), norm(4), nn.LayerNorm(4), norm(4))

    with pytest.warns(UserWarning, match="norm_affine: no affine after 1, 3, which are norms but no LayerNorm"):
        made = apply_rlrr(model(), target_modules="0", norm_affine=True)
    assert names_of(made, SSFLayerNorm) == {"2"}
    assert not made[1].weight.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_rlrr(model(), target_modules="0", norm_affine=True, exclude_modules=["1", "3"])
        apply_rlrr(model(), target_modules="0")
    with pytest.warns(UserWarning, match=r"no affine after blocks\.0\.norm1, blocks\.0\.norm2, .* and 2 more"):
        apply_rlrr(small_vit(norm_layer=timm.layers.RmsNorm))  # where the published method has them
