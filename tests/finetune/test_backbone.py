"""The model of a run: its weights, settings that reach it, and what each method trains."""

import copy
import re

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from rlrr_kernels import SSFAffine, SSFLayerNorm, apply_rlrr, count_parameters
from rlrr_kernels.finetune import Settings, prepare
from rlrr_kernels.finetune.backbone import (
    SSFLinear,
    _drop_elements,
    _zero_head,
    apply_lora,
    apply_ssf,
    build_model,
    load_backbone,
    matching_rank,
)
from tests.checkpoint.test_npz import google_arrays
from tests.small_models import X, small_swin, small_vit, stir


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vit_nonsense", "timm.list_models() lists"),
        ("vit_base_patch16_24", "did you mean vit_base_patch16_224"),
        ("vit_base_patch16_224.orig_in22k", "did you mean vit_base_patch16_224.orig_in21k"),
    ],
)
def test_an_unknown_model_is_named(name, hint):
    with pytest.raises(ValueError, match=re.escape(f"model: timm does not know {name!r}; {hint}")):
        prepare(Settings(model=name))


def test_drop_path_is_stochastic_depth_that_grows_with_depth():
    model = build_model(Settings(drop_path=0.4), 10)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("method", ["rlrr", "full"])
def test_drop_path_of_elements_is_dropout_at_the_same_rates(method):
    model = build_model(Settings(drop_path=0.4, drop_path_kind="element", method=method), 10).train()
    assert not [m for m in model.modules() if isinstance(m, DropPath)]
    paths = [m for name, m in model.named_modules() if "drop_path" in name and not isinstance(m, torch.nn.Identity)]
    assert [m.p for m in paths] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    branches = torch.ones(64, 17, 128)
    kept = paths[-1](branches)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert ((kept > 0).float().mean((1, 2)) - 0.6).abs().max() < 0.06  # of no image all or nothing
    assert torch.equal(paths[-1].eval()(branches), branches)


def test_elements_are_not_dropped_where_the_model_has_no_drop_path():
    model = torch.nn.Linear(2, 2)
    _drop_elements(model, Settings(drop_path_kind="element"))  # a rate of 0 needs none
    with pytest.raises(ValueError, match=r"drop_path_kind: expected image with model='.*', which has no DropPath"):
        _drop_elements(model, Settings(drop_path_kind="element", drop_path=0.1))


def test_a_head_of_zeros_gives_every_class_the_same_and_leaves_the_rest_as_drawn():
    torch.manual_seed(3)
    drawn = build_model(Settings(), 10)
    torch.manual_seed(3)
    model = build_model(Settings(head_init="zero"), 10)
    assert drawn.head.weight.std() > 0.01
    with torch.no_grad():
        assert torch.equal(model(torch.randn(3, 1, 28, 28)), torch.zeros(3, 10))
    assert all(p.requires_grad for p in model.head.parameters())
    others = {name: p for name, p in model.named_parameters() if not name.startswith("head.")}
    assert all(torch.equal(p, drawn.get_parameter(name)) for name, p in others.items())


def test_a_head_of_several_layers_does_not_start_at_zero():
    """With two zero layers only the last bias would get a gradient."""
    model = torch.nn.Module()
    model.get_classifier = lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"head_init: expected random with model='.*', whose head is no nn.Linear"):
        _zero_head(model, Settings(head_init="zero"))


@pytest.mark.parametrize("method", ["rlrr", "ssf", "lora"])
def test_a_family_that_the_method_does_not_know_is_refused_with_those_that_take_it(method):
    options = {"model": "test_convnext", "pretrained": False, "method": method}
    with pytest.raises(ValueError, match=f"with method='{method}', got 'test_convnext', .*; method='linear' and"):
        build_model(Settings(**options), 3)


def test_a_drop_path_of_0_is_honoured_where_timm_has_another_default():
    options = {"model": "swin_tiny_patch4_window7_224", "pretrained": False, "method": "linear"}
    assert not [m for m in build_model(Settings(**options), 3).modules() if isinstance(m, DropPath)]


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, 21_642),
        ({"norm_affine": False}, 21_642 - (2 * 5 + 1) * 2 * 128),
        ({"patch_affine": False}, 21_642 - 2 * 128),
        ({"norm_affine": False, "patch_affine": False}, 18_570),
    ],
)
def test_affines_can_be_left_out(changes, trained):
    assert count_parameters(build_model(Settings(**changes), 10))[0] == trained


def test_frozen_weights_are_kept_in_the_precision_asked_for():
    model = build_model(Settings(frozen_dtype="bf16"), 10)
    assert model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert model.blocks[0].mlp.fc1.scale_out.dtype == torch.float32
    assert build_model(Settings(), 10).blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_the_rank_reaches_every_adapted_linear():
    plain, model = (build_model(Settings(rank=rank), 10) for rank in (1, 4))
    assert model.blocks[0].mlp.fc1.scale_out.shape == (512, 4)
    # u and v of the linears have four times as many numbers, and nothing else changes
    scales = sum(p.numel() for name, p in plain.named_parameters() if name.endswith(("scale_out", "scale_in")))
    assert count_parameters(model)[0] == count_parameters(plain)[0] + 3 * scales


def test_the_image_size_reaches_the_model_and_the_images():
    ready = prepare(Settings(img_size=42, pretrained=False, device="cpu"))
    assert ready.model.patch_embed.img_size == (42, 42)
    image, _ = ready.splits.train[0]
    assert image.shape == (1, 42, 42)
    assert ready.model(image[None]).shape == (1, 10)


def test_a_model_without_an_image_size_says_so():
    with pytest.raises(ValueError, match="img_size: 'resnet10t' takes none, got 64"):
        build_model(Settings(model="resnet10t", pretrained=False, method="linear", img_size=64), 3)


def test_a_published_npz_replaces_the_pretrained_weights_but_not_the_head(tmp_path):
    donor = stir(timm.create_model(Settings.model, num_classes=10))
    np.savez(tmp_path / "vit.npz", **google_arrays(donor))
    model = build_model(Settings(checkpoint=tmp_path / "vit.npz", method="full"), 10)
    assert torch.equal(model.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)
    assert torch.equal(model.patch_embed.proj.weight, donor.patch_embed.proj.weight)
    assert not torch.equal(model.head.weight, donor.head.weight)
    with pytest.raises(ValueError, match=r"checkpoint: .*vit.npz: model: expected a timm VisionTransformer, got Swin"):
        load_backbone(small_swin(), tmp_path / "vit.npz")


def test_a_checkpoint_file_replaces_the_pretrained_weights(tmp_path):
    from safetensors.torch import save_file

    donor = prepare(Settings(out=tmp_path / "x", method="full")).model
    state = {n: p.detach() + 0.125 for n, p in donor.state_dict().items()}
    state["head.weight"], state["head.bias"] = torch.zeros(7, 128), torch.zeros(7)  # another head
    save_file(state, tmp_path / "donor weights.safetensors")
    model = prepare(Settings(checkpoint=tmp_path / "donor weights.safetensors", method="full")).model
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert model.head.weight.shape == (10, 128)


def test_a_checkpoint_that_does_not_fit_is_refused_not_half_loaded(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    state = {n: p.detach().clone() for n, p in prepare(Settings(method="full")).model.state_dict().items()}
    save_file({f"model.{n}": p for n, p in state.items()}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .* does not fit VisionTransformer: missing cls_token"):
        prepare(Settings(checkpoint=path))
    save_file({"nonsense": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .*(unexpected nonsense|does not fit|cannot be read)"):
        prepare(Settings(checkpoint=path))
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot be read"):
        prepare(Settings(checkpoint=path))


def test_batch_norm_stays_frozen_or_is_refused():
    small = {"model": "resnet10t", "pretrained": False}
    model = build_model(Settings(**small, method="linear"), 3).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    with pytest.raises(ValueError, match=r"has batch norm that would train with method='full': conv1\.1;"):
        prepare(Settings(**small, method="full"))


def test_ssf_puts_an_affine_after_every_linear_norm_and_the_patch_embedding():
    model, plain = apply_ssf(small_vit()), small_vit()
    kinds = {kind: [n for n, m in model.named_modules() if isinstance(m, kind)] for kind in (SSFLinear, SSFLayerNorm)}
    assert (len(kinds[SSFLinear]), len(kinds[SSFLayerNorm])) == (8, 5)
    assert isinstance(model.patch_embed.norm, SSFAffine)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"ssf_scale", "ssf_shift", "weight", "bias"}  # the last two are the head's
    assert not hasattr(model, "rlrr_config")
    # scale 1 and shift 0 give the plain model; a scale multiplies one output of a layer
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (SSFLinear, SSFLayerNorm, SSFAffine)):
                module.ssf_scale.fill_(1.0)
                module.ssf_shift.zero_()
        assert torch.allclose(model(X), plain(X), atol=1e-6)
        layer, x = model.blocks[1].mlp.fc1, torch.randn(3, 48)
        before = layer(x)
        layer.ssf_scale[5] = 3.0
        layer.ssf_shift[7] = 2.0
    expected = before.clone()
    expected[:, 5] *= 3
    expected[:, 7] += 2
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.equal(layer.weight, plain.blocks[1].mlp.fc1.weight)


@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_lora_of_the_matching_rank_trains_no_fewer_parameters_than_rlrr(make):
    pytest.importorskip("peft")
    ours, _ = count_parameters(apply_rlrr(make(), train_head=False))
    rank = matching_rank(make())

    def trained(rank):
        model = apply_lora(make(), rank)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in n or "head" in n for n in names)
        return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n), model

    count, model = trained(rank)
    fewer, _ = trained(rank - 1) if rank > 1 else (0, None)
    assert fewer < ours <= count
    assert torch.allclose(model.eval()(X), make()(X), atol=1e-6)  # B starts at 0
    stir(model.train())(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_lora_is_called_where_a_model_would_read_the_weight(name):
    """Otherwise the matrices of their qkv would never train."""
    pytest.importorskip("peft")
    small = {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)} if "swin" in name else {"depth": 1}
    model = timm.create_model(name, num_classes=3, **small)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)  # Swin V2 starts with zeros, which stop gradients
    apply_lora(model, 1)
    model(torch.randn(1, *model.pretrained_cfg["input_size"])).sum().backward()
    lora = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert any("qkv" in n for n in lora)
    assert all(p.grad is not None and p.grad.any() for p in lora.values())


def test_lora_leaves_the_head_a_plain_layer_that_trains():
    pytest.importorskip("peft")
    model = apply_lora(small_vit(), 2)
    assert type(model.head) is nn.Linear
    assert model.head.weight.requires_grad
    assert not model.blocks[0].norm1.weight.requires_grad
    assert model.blocks[0].attn.qkv.lora_A["default"].weight.shape == (2, 48)


def test_counting_leaves_the_model_alone():
    model = small_vit()
    before = copy.deepcopy(model.state_dict())
    matching_rank(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
