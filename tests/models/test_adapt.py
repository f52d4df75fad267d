"""apply_rlrr: what trains afterwards, at which start, and that no layer is bypassed."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, apply_rlrr, merge_and_unload
from tests.small_models import X, names_of, small_swin, small_vit, stir


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


def test_frozen_weights_in_bfloat16():
    model = apply_rlrr(small_vit(), frozen_dtype="bfloat16")
    layer = model.blocks[0].mlp.fc1
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (layer.scale_out.dtype, model.patch_embed.proj.weight.dtype) == (torch.float32, torch.float32)
    assert torch.equal(layer.weight, small_vit().blocks[0].mlp.fc1.weight.bfloat16())
    assert model(X).dtype is torch.float32


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
    """No layer is bypassed. EVA, BEiT and Swin V2 read qkv.weight themselves unless ``qkv_bias_separate`` is set."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a model that could not be run beforehand would warn in its first pass
        model = timm.create_model(name, num_classes=3, **options)
        for norm in names_of(model, nn.LayerNorm):
            nn.init.ones_(model.get_submodule(norm).weight)  # Swin V2 starts with zeros, which stop gradients
        apply_rlrr(model)
        size = model.pretrained_cfg["input_size"][1:] if "img_size" not in options else (options["img_size"],) * 2
        stir(model)(torch.randn(2, 3, *size)).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    untouched = [n for n, p in trained if p.grad is None or not p.grad.any()]
    assert untouched == []


@pytest.mark.parametrize("family", ["EVA-02", "BEiT", "Swin V2"])
def test_a_model_that_bypasses_a_layer_is_refused_and_left_alone(family, monkeypatch):
    """As with older versions of timm, whose Swin V2 has no switch to call its qkv."""
    name, options = FAMILIES[family]
    model = timm.create_model(name, num_classes=3, **options)
    monkeypatch.setattr("rlrr_kernels.models.adapt.qkv_readers", lambda *_: [])
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"model: .* does not call .*attn\.qkv as modules.*exclude_modules"):
        apply_rlrr(model)
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())
    apply_rlrr(model, exclude_modules=["*.qkv"])
    assert not any(n.endswith("qkv") for n in names_of(model, FusedRLRRLinear))


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
def test_pytorchs_encoder_layers_call_adapters_in_evaluation_too(norm_affine):
    """Their fast path for evaluation would read the weights of linears and norms."""
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


def test_running_the_model_on_an_example_computes_nothing_and_changes_nothing():
    """Neither its buffers nor attributes that its code sets."""

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
