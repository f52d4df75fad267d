"""RLRR as a method of PEFT: the formula, and all that PEFT does with its methods."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rlrr_kernels.backends import reference
from tests.oracle import assert_close
from tests.small_models import X, small_vit

peft = pytest.importorskip("peft", minversion="0.20")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from rlrr_kernels.peft import RlrrConfig  # noqa: E402

M, N, K = 6, 24, 16
ROWS = torch.randn(M, K, generator=torch.Generator().manual_seed(0))


def stirred(model: nn.Module, seed: int = 1) -> nn.Module:
    """Adapters as after training, shifts too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rlrr_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def linear(kind: str = "linear") -> nn.Module:
    torch.manual_seed(0)
    return Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N, bias=kind != "no bias")


def model_of(*configs, kind: str = "linear", dtype=torch.float32) -> peft.PeftModel:
    """An adapter "default" and one "1", "2", ... for each further config, all active."""
    configs = [RlrrConfig(target_modules=["0"], **config) for config in configs]
    model = peft.get_peft_model(nn.Sequential(linear(kind)).to(dtype), configs[0])
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    model.base_model.set_adapter(list(model.peft_config))
    return stirred(model).eval()


def expected(model: peft.PeftModel, names, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y by the formula, from the adapters' parameters: W * (1 + the sum of s u v), and the sum of f."""
    layer = model.base_model.model[0]
    base = layer.base_layer
    weight = (base.weight.mT if isinstance(base, Conv1D) else base.weight).to(dtype)
    scale, y = torch.ones_like(weight), 0
    for name in names:
        config = model.peft_config[name]
        u, v = layer.rlrr_scale_out[name].to(dtype), layer.rlrr_scale_in[name].to(dtype)
        scale = scale + config.scaling * (reference.scale_matrix(u, v, dtype) - 1)
        y = y + (layer.rlrr_shift[name].to(dtype) if config.shift else 0)
    return nn.functional.linear(x.to(dtype), weight * scale, None if base.bias is None else base.bias.to(dtype)) + y


CONFIGS = {
    "rank 1": [{}],
    "rank 8, scaled": [{"r": 8, "scaling": 0.5}],
    "groups, no shift": [{"r": 2, "groups": 3, "shift": False}],
    "three": [{"r": 2, "groups": 2}, {"r": 3, "groups": 3, "scaling": 2.0}, {"shift": False, "init_weights": "paper"}],
}


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("case", CONFIGS)
def test_outputs_and_gradients_are_those_of_the_formula(case, kind):
    model = model_of(*CONFIGS[case], kind=kind)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shifts = sum(c.get("shift", True) for c in CONFIGS[case])
    assert len(trained) == 2 * len(CONFIGS[case]) + shifts
    dy = torch.randn(M, N, generator=torch.Generator().manual_seed(2))
    results = []
    for dtype in (None, torch.float32, torch.float64):
        y = model(ROWS) if dtype is None else expected(model, model.peft_config, ROWS, dtype)
        grads = torch.autograd.grad(y, list(trained.values()), dy.to(y.dtype))
        results.append([y.detach(), *grads])
    # float64 gradients arrive rounded to the parameters' float32, which the yardstick allows
    for name, got, plain, exact in zip(["y", *trained], *results, strict=True):
        assert_close(name, got, plain, exact)


def test_adapters_are_switched_disabled_and_deleted():
    model = model_of({"r": 2}, {"r": 3})
    plain = linear()(ROWS)
    for names in (["default"], ["1"], ["default", "1"]):
        model.base_model.set_adapter(names)
        torch.testing.assert_close(model(ROWS), expected(model, names, ROWS, torch.float32))
        trained = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set(names)
    with model.disable_adapter():
        assert torch.equal(model(ROWS), plain)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ROWS), plain)
    model.delete_adapter("default")
    assert torch.equal(model(ROWS), model_of({"r": 2}, {"r": 3}).base_model.model[0]._adapted(ROWS, ["1"]))
    assert not [name for name in model.state_dict() if "default" in name]
    model.delete_adapter("1")
    assert torch.equal(model.base_model.model(ROWS), plain)


def test_a_second_adapter_of_more_layers_does_not_train_until_it_is_set():
    model = peft.get_peft_model(small_vit(), RlrrConfig(target_modules=["fc1"]))
    model.add_adapter("second", RlrrConfig(target_modules=["fc1", "fc2"]))
    for names, layers in ((["default"], 2), (["second"], 4)):
        model.base_model.set_adapter(names)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) == 3 * layers
        assert all(name.endswith(names[0]) for name in trained)


def test_a_mixed_batch_gives_each_row_its_adapter():
    model = model_of({"r": 2}, {"r": 3, "groups": 2})
    names = ["1", "default", "__base__", "1", "default", "default"]
    y = model(ROWS, adapter_names=names)
    for row, name in enumerate(names):
        used = [] if name == "__base__" else [name]
        torch.testing.assert_close(y[row], expected(model, used, ROWS[row : row + 1], torch.float32)[0])
    assert not model.base_model.model[0]._forward_pre_hooks
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(ROWS, adapter_names=["2"] * M)
    with pytest.raises(ValueError, match="adapter_names: expected 6, one for each row of x, got 2"):
        model(ROWS, adapter_names=["1"] * 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter first"):
        model(ROWS, adapter_names=names)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(ROWS, adapter_names=names)


VIT = {"target_modules": ["qkv", "attn.proj", "fc1", "fc2"], "groups_pattern": {"qkv": 3}, "modules_to_save": ["head"]}


def test_a_timm_vit_starts_as_it_was_trains_and_is_saved_and_loaded(tmp_path):
    plain = small_vit()(X)
    model = peft.get_peft_model(small_vit(), RlrrConfig(r=2, **VIT))
    assert torch.allclose(model(X), plain, atol=1e-5)
    assert model.base_model.model.blocks[0].attn.qkv.rlrr_scale_in["default"].shape == (3, 2, 48)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):  # v's gradient is 0 where u is
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 3 * 8 + 2
    assert all(g is not None and bool(g.any()) for g in grads.values())
    y = model.eval()(X)
    assert not torch.allclose(y, plain, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_vit(), tmp_path)
    assert torch.equal(loaded(X), y)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].groups_pattern == {"qkv": 3}
    assert loaded.peft_config["default"].peft_type is peft.PeftType.RLRR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_language_model_trains_with_checkpointing_and_generates(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(dtype)
    config = RlrrConfig(r=4, shift=False, task_type="CAUSAL_LM", init_weights="paper")
    model = peft.get_peft_model(llama, config).train()
    assert config.target_modules == {"q_proj", "v_proj"}  # PEFT's own choice for Llama
    tokens = torch.arange(30).view(2, 15) * 7 % 60
    grads = []
    for _ in range(2):
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    assert len(grads[0]) == 8
    assert {g.dtype for g in grads[0]} == {torch.float32}
    torch.testing.assert_close(*grads)
    model.eval().add_adapter("other", RlrrConfig(r=2, task_type="CAUSAL_LM", target_modules=["o_proj"]))
    both = model.generate(tokens, max_new_tokens=3, do_sample=False, adapter_names=["default", "__base__"], num_beams=2)
    alone = model.generate(tokens[:1], max_new_tokens=3, do_sample=False, num_beams=2)
    assert torch.equal(both[0], alone[0])
    with model.disable_adapter():
        assert torch.equal(both[1], model.generate(tokens[1:], max_new_tokens=3, do_sample=False, num_beams=2)[0])


def test_compiled_without_a_break():
    model = model_of({"r": 2}, {"r": 3, "scaling": 0.5})
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ROWS), model(ROWS))


@pytest.mark.slow
def test_the_package_itself_does_not_import_peft():
    script = "import rlrr_kernels, sys; sys.exit(bool({'peft', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_hooks_of_the_frozen_layer_run_with_the_adapted_values(kind):
    model = model_of({"r": 2}, kind=kind)
    want = model(ROWS)
    seen = []
    handle = model.base_model.model[0].base_layer.register_forward_hook(lambda _, given, y: seen.append(y.detach()))
    y = model(ROWS)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(seen[0], want.detach())
    y.sum().backward()
    with_hooks = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    handle.remove()
    model.zero_grad()
    model(ROWS).sum().backward()
    assert len(with_hooks) == 3
    for ours, theirs in zip(with_hooks, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_hook_that_sets_the_weight_sets_what_the_adapter_rescales(compiled):
    model = model_of({"r": 2})
    layer = model.base_model.model[0]
    prune.l1_unstructured(layer.base_layer, "weight", 0.25)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    plain, exact = (expected(model, ["default"], ROWS, dtype) for dtype in (torch.float32, torch.float64))
    assert_close("y", run(ROWS), plain, exact)
    assert "forward" not in vars(layer.base_layer)
    run(ROWS).sum().backward()
    assert layer.rlrr_scale_out["default"].grad.abs().min() > 0
    with pytest.raises(RuntimeError, match="Linear: cannot merge while weight is computed from other tensors"):
        model.merge_adapter()


def test_a_layer_that_accelerate_moves_and_one_with_a_forward_of_its_own():
    hooks = pytest.importorskip("accelerate.hooks")
    model = model_of({"r": 2})
    want, base = model(ROWS), model.base_model.model[0].base_layer
    hooks.add_hook_to_module(base, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    for _ in range(2):
        assert torch.equal(model(ROWS), want)
    hooks.remove_hook_from_module(base)
    assert torch.equal(model(ROWS), want)
    base.forward = lambda x: x
    with pytest.raises(RuntimeError, match="base_layer: expected the forward of Linear, got one of its own"):
        model(ROWS)


def test_a_mixed_batch_of_no_rows():
    assert model_of({"r": 2})(ROWS[:0], adapter_names=[]).shape == (0, N)


def test_ranks_that_add_up_to_too_many_name_their_adapters():
    model = model_of({"r": 100}, {"r": 100})
    with pytest.raises(ValueError, match="adapters default, 1: expected ranks of at most 128 in sum, got 200"):
        model(ROWS)
