"""PEFT's tuners over adapted layers compute and merge the same as over plain layers that compute the same."""

import copy
import pickle

import pytest
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear

peft = pytest.importorskip("peft")

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(2))

ADDING = {
    "lora": lambda **k: peft.LoraConfig(r=4, **k),
    "lora bias": lambda **k: peft.LoraConfig(r=4, lora_bias=True, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=[], **k),
    "loha": lambda **k: peft.LoHaConfig(r=4, **k),
    "vera": lambda **k: peft.VeraConfig(r=4, **k),
    "adalora": lambda **k: peft.AdaLoraConfig(total_step=9, **k),
    "beft": lambda **k: peft.BeftConfig(**k),
    "ln tuning": lambda **k: peft.LNTuningConfig(**k),
}
READING = {
    "dora": lambda **k: peft.LoraConfig(r=4, use_dora=True, **k),
    "pissa": lambda **k: peft.LoraConfig(r=4, init_lora_weights="pissa", **k),
    "olora": lambda **k: peft.LoraConfig(r=4, init_lora_weights="olora", **k),
    "hra": lambda **k: peft.HRAConfig(r=4, **k),
    "hira": lambda **k: peft.HiraConfig(r=4, **k),
    "shira": lambda **k: peft.ShiraConfig(r=2, **k),
}


def model_of(plain: bool, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = FusedRLRRLinear(16, 16, bias)
    nn.init.normal_(layer.shift)
    return nn.Sequential(nn.Linear(16, 16), layer.to_linear() if plain else layer).eval()


def wrapped(config, plain: bool, **options) -> nn.Module:
    torch.manual_seed(1)
    model = peft.get_peft_model(model_of(plain, **options), config(target_modules=["1"])).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            # LNTuning trains a copy of the whole layer, of which the plain one has two of the five tensors
            if parameter.requires_grad and not name.endswith(("scale_out", "scale_in", "shift")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.mark.parametrize("config", ADDING.values(), ids=ADDING.keys())
def test_a_tuner_that_adds_is_right_merged_unmerged_and_unloaded(config):
    model = wrapped(config, plain=False)
    layer, y = model.base_model.model[1].base_layer, model(X).detach()
    if config is not ADDING["ln tuning"]:  # it trains a copy of the layer, which rescales W as well
        assert largest(y, wrapped(config, plain=True)(X)) < 1e-6
    assert largest(y, model_of(plain=True)(X)) > 0.01  # it does something
    model.merge_adapter()
    assert largest(model(X), y) < 1e-5
    model.unmerge_adapter()
    assert model.base_model.model[1].base_layer is layer
    assert torch.equal(model(X), y)
    plain = model.merge_and_unload()
    assert largest(plain(X), y) < 1e-5
    if config is not ADDING["ln tuning"]:
        assert type(plain[1]) is nn.Linear


@pytest.mark.parametrize("convert", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_merges_into_its_own_layers(convert):
    first = wrapped(ADDING["lora"], plain=False)
    y = first(X)
    second = convert(first)
    merged = second.merge_and_unload()
    assert largest(merged(X), y) < 1e-5
    assert torch.equal(first(X), y)
    assert isinstance(first.base_model.model[1].base_layer, FusedRLRRLinear)


def test_lora_trains_over_the_layer_and_beside_u_v_and_f():
    model = wrapped(ADDING["lora"], plain=False).train()
    tuner = model.base_model.model[1]
    tuner.base_layer.scale_out.requires_grad_(True)
    model(X).square().sum().backward()
    assert tuner.base_layer.scale_out.grad.abs().sum() > 0
    assert tuner.lora_B["default"].weight.grad.abs().sum() > 0
    assert tuner.base_layer.weight.grad is None


@pytest.mark.parametrize("config", READING.values(), ids=READING.keys())
def test_a_tuner_that_reads_the_weight_is_refused_with_the_way_out(config):
    model = model_of(plain=False)
    weight = model[1].weight.clone()
    with pytest.raises(TypeError, match=r"the weight of its layer, which is rescaled; call rlrr_kernels.merge_and_un"):
        peft.get_peft_model(model, config(target_modules=["1"]))
    assert torch.equal(model[1].weight, weight)
    peft.get_peft_model(model_of(plain=True), config(target_modules=["1"]))  # what the error recommends


def test_a_second_tuner_over_the_first_is_refused():
    model = peft.PeftMixedModel(model_of(plain=False), ADDING["lora"](target_modules=["1"]))
    with pytest.raises(TypeError, match=r"a second tuner, peft\.tuners\.loha\.layer\.Linear, into it; call"):
        model.add_adapter("second", ADDING["loha"](target_modules=["1"]))


def test_hooks_stay_through_a_merge():
    model, called = wrapped(ADDING["lora"], plain=False), []
    model.base_model.model[1].base_layer.register_forward_hook(lambda *_: called.append(1))
    for step in (model.merge_adapter, model.unmerge_adapter):
        step()
        model(X)
    assert len(called) == 2


def test_parameters_that_peft_adapts_stay_rescaled_when_merged():
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["1.weight"], init_lora_weights=False)
    model = peft.get_peft_model(model_of(plain=False), config)
    y = model(X)
    assert largest(y, model_of(plain=False)(X)) > 0.01
    assert largest(model.merge_and_unload()(X), y) < 1e-5


def test_a_layer_that_cannot_be_merged_says_so_and_stays():
    model = wrapped(ADDING["lora"], plain=False)
    layer = model.base_model.model[1].base_layer
    layer.enabled = False
    with pytest.raises(RuntimeError, match="switched off"):
        model.merge_adapter()
    layer.enabled = True
    with torch.no_grad():
        model.base_model.model[1].lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert model.base_model.model[1].base_layer is layer


def test_a_merge_that_adds_a_bias_warns():
    layer = FusedRLRRLinear(4, 4, bias=False)
    nn.init.ones_(layer.shift)
    model = peft.get_peft_model(nn.Sequential(layer), peft.LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="merging gives a bias that holds f to layers that had none"):
        model.merge_adapter()
