"""SSF and LoRA are what they say, so that a comparison with them is one."""

import copy

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import SSFAffine, SSFLayerNorm, apply_rlrr, count_parameters
from rlrr_kernels.finetune.backbone import SSFLinear, apply_lora, apply_ssf, matching_rank
from tests.small_models import X, small_swin, small_vit, stir


def test_ssf_puts_an_affine_after_every_linear_norm_and_the_patch_embedding():
    model, plain = apply_ssf(small_vit()), small_vit()
    kinds = {kind: [n for n, m in model.named_modules() if isinstance(m, kind)] for kind in (SSFLinear, SSFLayerNorm)}
    assert (len(kinds[SSFLinear]), len(kinds[SSFLayerNorm])) == (8, 5)
    assert isinstance(model.patch_embed.norm, SSFAffine)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"ssf_scale", "ssf_shift", "weight", "bias"}  # the last two are the head's
    assert not hasattr(model, "rlrr_config")
    # with scale 1 and shift 0 it is the plain model, and a scale is one of a layer's outputs
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
    """Their qkv, whose matrices would never train."""
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
