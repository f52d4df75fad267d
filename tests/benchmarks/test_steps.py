"""Training steps: the published formula's model equals ours, and each method trains what it should."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from benchmarks import results
from benchmarks.activations import kept_per_token
from benchmarks.measures import relative_error, saved_for_backward
from benchmarks.steps import FormulaLinear, Step, build
from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm
from rlrr_kernels.models.modules import head

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}


def small(implementation: str, rank: int = 1) -> nn.Module:
    return build(implementation, "vit_tiny_patch16_224", "cpu", rank, **SMALL)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    images, labels = batch()
    nn.functional.cross_entropy(model(images), labels).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_official_formula_is_the_same_model_by_plain_operations():
    ours, official = small(results.OURS), small(results.OFFICIAL)
    assert FusedRLRRLinear in kinds(ours)
    assert SSFLayerNorm in kinds(ours)
    assert not {FusedRLRRLinear, SSFLayerNorm} & kinds(official)
    assert {FormulaLinear, SSFAffine} <= kinds(official)
    images, _ = batch()
    torch.testing.assert_close(official(images), ours(images), rtol=1e-4, atol=1e-4)
    mine, theirs = gradients(ours), gradients(official)
    # norms are two modules there, and the affine is the second
    renamed = {name.replace(".1.ssf_", ".ssf_"): g for name, g in theirs.items()}
    assert renamed.keys() == mine.keys()
    assert len(mine) == 2 * (4 * 3 + 2 * 2) + 2 + 2 + 2  # blocks, last norm, patch affine, head
    for name, gradient in mine.items():
        torch.testing.assert_close(
            renamed[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradient_tell_wrong_models_from_right_ones(dtype, rank):
    """The error of a step is within 1% for the same model, and larger if one gradient is missing."""
    ours, official = (Step(small(name, rank), *batch(), dtype) for name in (results.OURS, results.OFFICIAL))
    assert ours.model.blocks[0].mlp.fc1.scale_out.shape == (192, rank)
    want = official.loss_and_gradient()
    assert relative_error(ours.loss_and_gradient(), want) < (1e-4 if dtype is torch.float32 else 0.01)
    assert all(p.grad is None for p in ours.model.parameters())
    norm = torch.stack([p.grad.norm() for p in _trained_with_gradients(official)]).norm()
    torch.testing.assert_close(norm, want[1])
    ours.model.head.requires_grad_(False)
    assert relative_error(ours.loss_and_gradient(), want) > 0.05


def _trained_with_gradients(step: Step) -> list[nn.Parameter]:
    with torch.autocast("cpu", step.dtype, enabled=step.dtype is not torch.float32):
        nn.functional.cross_entropy(step.model(step.images), step.labels).backward()
    return [p for p in step.model.parameters() if p.requires_grad]


def test_the_formulas_layer_is_one_linear_and_keeps_one_rescaled_weight():
    official = small(results.OFFICIAL)
    layer = official.blocks[0].attn.qkv
    x = torch.randn(2, 48, requires_grad=True)
    kept = [layer.weight, layer.bias, layer.scale_in, layer.scale_out, layer.shift]
    saved, saved_x = saved_for_backward(lambda: layer(x), x, kept)
    assert (saved, saved_x) == (4 * 3 * 48 * 48, True)


@pytest.mark.parametrize(
    ("implementation", "trains"),
    [
        (results.LORA, {"lora_A", "lora_B"}),
        (results.HIRA, {"hira_A", "hira_B"}),
        (results.HIRAS[8], {"hira_A", "hira_B"}),
        (results.SSF, {"ssf_scale", "ssf_shift"}),
        (results.PROBE, set()),
    ],
)
def test_each_method_trains_its_own_and_the_head(implementation, trains):
    ranks = {results.LORA: 8, results.HIRA: 1, results.HIRAS[8]: 8}
    if implementation in ranks:
        pytest.importorskip("peft")
    model = small(implementation, 8 if implementation == results.HIRAS[8] else 1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {f"head.{name}" for name, _ in head(model).named_parameters()}
    assert heads <= trained
    found = {part for name in trained - heads for part in name.split(".") if part in trains}
    assert found == trains
    assert all(any(part in name for part in trains) for name in trained - heads)
    if implementation in ranks:
        factors = [p for name, p in model.named_parameters() if p.requires_grad and name not in heads]
        assert len(factors) == 2 * 2 * 4
        assert {min(p.shape) for p in factors} == {ranks[implementation]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_learns_and_leaves_no_gradient(dtype):
    model = small(results.OURS)
    frozen = model.blocks[0].attn.qkv.weight.clone()
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    step = Step(model, *batch(), dtype)
    parameters = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert step.resident_bytes() == parameters
    losses = [float(step()) for _ in range(3)]
    assert losses[2] < losses[0]
    assert torch.equal(model.blocks[0].attn.qkv.weight, frozen)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert all(p.grad is None for p in model.parameters())
    # AdamW: two moments of each trained parameter, and a count of 4 bytes
    state = sum(2 * p.nbytes + 4 for p in before.values())
    assert step.resident_bytes() == parameters + state


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [results.OURS_COMPILED, results.OFFICIAL_COMPILED])
def test_compiled_steps_compute_what_eager_ones_do(implementation, monkeypatch):
    """Captured whole, with gradients; what inductor makes of the graph would take a minute here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    compiled = small(implementation)
    assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule)
    eager = small(implementation.removesuffix(" compiled"))
    losses = [
        [float(step()) for _ in range(2)] for step in (Step(m, *batch(), torch.float32) for m in (compiled, eager))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_models_start_equal():
    """Every method measures the same frozen weights."""
    weights = [
        small(name).state_dict()["blocks.1.mlp.fc1.weight"] for name in (results.OURS, results.OFFICIAL, results.FULL)
    ]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_keeps_each_activation_once(dtype):
    """Of width D: the residual stream before both norms, q, k, v, what attention returns, and h (4 D)."""
    kept = kept_per_token(results.OURS, dtype, "vit_tiny_patch16_224", 64)
    elements = 2 * 192 * 4 + 8 * 192 * dtype.itemsize
    assert elements <= kept < 1.02 * elements


@pytest.mark.parametrize(("dtype", "per_block"), [(torch.float32, 36), (torch.bfloat16, 38)], ids=str)
def test_a_step_takes_half_the_launches_of_the_official_formula(dtype, per_block):
    """A step of small batches on a fast GPU is bound by their number."""
    deep = SMALL | {"depth": 12}
    counts = {}
    for method in (results.OURS, results.OFFICIAL):
        model = build(method, "vit_tiny_patch16_224", "cpu", **deep)
        counts[method] = Step(model, *batch(), dtype).launches()
    assert counts[results.OURS] <= 12 * per_block + 20
    assert counts[results.OURS] < 0.5 * counts[results.OFFICIAL]
