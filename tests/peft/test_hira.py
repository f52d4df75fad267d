"""PEFT's HiRA on the op: the outputs and gradients of PEFT's own code, on the same parameters, and undone by a call."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.oracle import assert_close

peft = pytest.importorskip("peft", minversion="0.20")

from peft.tuners.hira.layer import Linear  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from rlrr_kernels.peft import accelerate_hira, hira, restore_hira  # noqa: E402

M, N, K = 24, 40, 56


@pytest.fixture
def calls(monkeypatch):
    """The ranks with which the op was called."""
    seen, op = [], hira.rescaled_linear

    def spy(x, weight, u, v, *rest):
        seen.append(u.shape[1])
        return op(x, weight, u, v, *rest)

    monkeypatch.setattr(hira, "rescaled_linear", spy)
    return seen


def stirred(model: nn.Module) -> nn.Module:
    """Adapters as training makes them: B A is a good part of 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hira_" in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * (0.7 if "hira_B" in name else min(parameter.shape) ** -0.5))
    return model


def hira_model(r: int = 8, ranks=(), base=None, dtype=torch.float32, autocast_adapters: bool = True, **config):
    """A model of PEFT with an adapter, and one more of each of ``ranks``, all active."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, N)) if base is None else base
    config = {"target_modules": ["0"], "init_weights": False} | config
    options = {"autocast_adapter_dtype": autocast_adapters}
    model = peft.get_peft_model(base.to(dtype), peft.HiraConfig(r=r, **config), **options)
    for i, rank in enumerate(ranks):
        model.add_adapter(str(i), peft.HiraConfig(r=rank, **config), **options)
    model.base_model.set_adapter(["default", *map(str, range(len(ranks)))])
    return stirred(model)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, M // 2, K, generator=generator).to(dtype)


def passes(model: nn.Module, x: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = model(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    y.backward(dy.to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert grads
    return {"y": y.detach(), "dx": x.grad, **grads}


def check_equal(model, ours, x: torch.Tensor, autocast: bool = False) -> None:
    """Hold every output and gradient to the yardstick, with PEFT's own code as the plain formula."""
    exact = passes(copy.deepcopy(model).double(), x.double())
    plain, got = passes(model, x, autocast), passes(ours, x, autocast)
    assert plain.keys() == got.keys()
    for name, value in got.items():
        assert_close(name, value, plain[name], exact[name])


CASES = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 adapters": {"dtype": torch.bfloat16, "autocast_adapters": False},
    "float16": {"dtype": torch.float16},
    "conv1d": {"base": "conv1d"},
    "no bias": {"base": "no bias"},
}


@pytest.mark.parametrize("ranks", [(1,), (8,), (32,), (8, 3, 1)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case, ranks, calls):
    options = dict(CASES[case])
    if options.get("base") == "conv1d":
        options |= {"base": nn.Sequential(Conv1D(N, K)), "fan_in_fan_out": True}
    elif options.get("base") == "no bias":
        options["base"] = nn.Sequential(nn.Linear(K, N, False))
    model = hira_model(ranks[0], ranks[1:], **options)
    ours = copy.deepcopy(model)
    report = accelerate_hira(ours)
    assert (report.fused, report.left) == (("base_model.model.0",), {})
    check_equal(model, ours, inputs(options.get("dtype", torch.float32)))
    assert calls == [sum(ranks)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [1, 8, 32])
def test_autocast_is_that_of_peft(r, dtype, calls):
    model = hira_model(r, dtype=dtype)
    ours = copy.deepcopy(model)
    accelerate_hira(ours)
    check_equal(model, ours, inputs(), autocast=True)
    assert calls == [r]


def test_parameters_are_shared_in_place_and_the_call_is_undone():
    model = hira_model()
    state, names = dict(model.state_dict()), [(name, id(p)) for name, p in model.named_parameters()]
    y, text = model(inputs()), repr(model)
    accelerate_hira(model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == names
    assert model.state_dict().keys() == state.keys()
    again = accelerate_hira(model)
    assert again.fused == ("base_model.model.0",)
    restore_hira(model)
    assert type(model.base_model.model[0]) is Linear
    assert repr(model) == text
    assert torch.equal(model(inputs()), y)


def test_peft_saves_and_loads_it_unchanged(tmp_path, calls):
    model = hira_model()
    y = model(inputs())
    accelerate_hira(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(K, N)), tmp_path)
    assert torch.equal(loaded(inputs()), y)  # PEFT's own code on what was saved
    accelerate_hira(loaded)
    torch.testing.assert_close(loaded(inputs()), y)
    assert calls == [8]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_accelerated_too(copied, calls):
    model = hira_model()
    accelerate_hira(model)
    assert torch.equal(copied(model)(inputs()), model(inputs()))
    assert len(calls) == 2


def test_merged_disabled_and_switched_as_peft(calls):
    model = hira_model(8, (3,))
    ours = copy.deepcopy(model)
    accelerate_hira(ours)
    x, results = inputs(), []
    for each in (model, ours):
        steps = {"both": each(x)}
        each.merge_adapter(["default"])
        steps["merged"] = each(x)
        each.unmerge_adapter()
        steps["unmerged"] = each(x)
        with each.disable_adapter():
            steps["disabled"] = each(x)
        each.set_adapter("0")
        steps["switched"] = each(x)
        each.delete_adapter("default")
        steps["deleted"] = each(x)
        steps["unloaded"] = each.merge_and_unload(safe_merge=True)(x)
        results.append(steps)
    theirs, got = results
    for step in ("merged", "disabled", "unloaded"):
        assert torch.equal(got[step], theirs[step]), step
    for step in ("both", "unmerged", "switched", "deleted"):
        torch.testing.assert_close(got[step], theirs[step], msg=step)
    assert not torch.allclose(theirs["both"], theirs["disabled"], atol=0.1)
    assert calls == [11, 11, 3, 3]


def test_dropout_trains_on_peft_s_code_and_evaluates_on_the_op(calls):
    model = hira_model(hira_dropout=0.5)
    report = accelerate_hira(model)
    assert report.fused == ()
    assert report.left["base_model.model.0"].startswith("hira_dropout is above 0")
    ys = []
    for change in (lambda m: None, restore_hira):
        change(model)
        torch.manual_seed(5)
        ys.append(model.train()(inputs()))
    assert torch.equal(*ys)
    assert calls == []
    accelerate_hira(model.eval())
    model(inputs())
    assert calls == [8]


def test_what_the_op_does_not_compute_is_named_and_stays_peft_s(calls):
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = nn.ModuleDict(
        {
            "plain": nn.Linear(K, N),
            "own": Own(K, N),
            "embedding": nn.Embedding(7, N),
            "conv": nn.Conv1d(3, 5, 1),
            "wide": nn.Linear(K, N),
            "hooked": nn.Linear(K, N),
        }
    )
    model = hira_model(100, (100,), base=base, target_modules=list(base), rank_pattern={"plain|own|hooked": 2})
    layers, seen = model.base_model.model, []
    layers["hooked"].base_layer.register_forward_hook(lambda *_: seen.append(1))
    theirs = {name: copy.deepcopy(layers[name]) for name in base}
    report = accelerate_hira(model)
    assert report.fused == ("base_model.model.plain",)
    reasons = {
        "own": "whose forward is its own",
        "embedding": "hira.layer.Embedding is not PEFT's layer over a plain linear",
        "conv": "hira.layer.Conv1d is not",
        "wide": "rank 200 together, the op at most 128",
        "hooked": "has hooks",
    }
    assert report.left.keys() == {f"base_model.model.{name}" for name in reasons}
    for name, reason in reasons.items():
        assert reason in report.left[f"base_model.model.{name}"]
        assert f"{name}: " in str(report)
        if name != "conv":
            x = torch.arange(5) if name == "embedding" else inputs()
            assert torch.equal(layers[name](x), theirs[name](x)), name
    assert len(seen) == 2
    assert calls == []


def test_a_model_without_hira_is_refused():
    with pytest.raises(ValueError, match="model: expected one with HiRA layers of PEFT, got Linear without any"):
        accelerate_hira(nn.Linear(3, 3))


def test_an_x_of_another_dtype_gets_pytorch_s_error():
    model = hira_model()
    accelerate_hira(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(inputs(torch.bfloat16))


def small_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 60}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def test_a_language_model_trains_the_same_with_checkpointing(calls):
    model = hira_model(4, base=small_llama(), target_modules="all-linear", task_type="CAUSAL_LM").train()
    ours = copy.deepcopy(model)
    assert len(accelerate_hira(ours).fused) == 14
    tokens = torch.arange(30).view(2, 15) * 7 % 60
    losses, grads = [], []
    for each in (model, ours):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        each.enable_input_require_grads()
        loss = each(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in each.parameters() if p.requires_grad])
    assert len(calls) == 28  # each layer once more in backward
    torch.testing.assert_close(*losses)
    assert len(grads[0]) == 28
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_compiled_without_a_break():
    model = hira_model(8, (3,))
    accelerate_hira(model)
    eager = passes(model, inputs())
    model.zero_grad()
    torch.compiler.reset()
    compiled = passes(torch.compile(model, backend="aot_eager", fullgraph=True), inputs())
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name.replace("base_model", "_orig_mod.base_model")], value)
