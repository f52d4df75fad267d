"""Inputs that backward forms again: the same bits as kept ones, nothing kept, and what the user changes or holds."""

import pytest
import timm
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlrr_kernels import FusedRLRRLinear, SSFLayerNorm, apply_rlrr
from rlrr_kernels.ops import recompute

BEFORE = {
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU("tanh"),
    "layer norm": SSFLayerNorm(12),
    "layer norm for linears": SSFLayerNorm(12),
}
BEFORE["layer norm for linears"].autocast_output = True


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    return FusedRLRRLinear(12, 8, dtype=dtype)


def gradients(before, x, linear, autocast=False):
    """The output, and the gradients of x and of all that trains."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(before(x * 1))
    trained = [p for p in (*before.parameters(), *linear.parameters()) if p.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), (x, *trained))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_gradients_are_those_of_kept_inputs_bit_for_bit(before, autocast, monkeypatch):
    x, linear = torch.randn(3, 5, 12, requires_grad=True), layer()
    got = gradients(before, x, linear, autocast)
    monkeypatch.setattr(recompute, "_enabled", False)
    for ours, kept in zip(got, gradients(before, x, linear, autocast), strict=True):
        assert ours.dtype is kept.dtype
        assert torch.equal(ours, kept)


def is_kept(before, linear, x, autocast=False):
    """Whether what ``before`` returned is still in memory after the forward pass."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = before(x * 1)
        storage = StorageWeakRef(result.untyped_storage())
        y = linear(result)
    del result
    kept = not storage.expired()
    y.sum().backward()
    return kept


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_the_input_is_not_kept(before, autocast, monkeypatch):
    x, linear = torch.randn(3, 5, 12, requires_grad=True), layer()
    assert not is_kept(before, linear, x, autocast)
    monkeypatch.setattr(recompute, "_enabled", False)
    # under autocast the linear layer keeps its own 16-bit copy of a float32 result
    narrow = before is BEFORE["layer norm for linears"]
    assert is_kept(before, linear, x, autocast) is (narrow or not autocast)


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_a_checkpointed_region_before_the_layer_runs_once_in_forward_and_once_in_backward(before):
    x, linear, runs = torch.randn(5, 12, requires_grad=True), layer(), []

    def region(x):
        runs.append(None)
        return before(x * 1)

    y = linear(checkpoint(region, x, use_reentrant=False))
    assert len(runs) == 1
    y.sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_results_of_a_graph_that_is_freed_or_changed_can_still_be_used(before):
    x, linear = torch.randn(5, 12, requires_grad=True), layer()
    freed = before(x * 1)
    freed.sum().backward(retain_graph=False)
    changed = before(z := x * 1)
    with torch.no_grad():
        z.mul_(2)
        want = [linear(h.detach()) for h in (freed, changed)]
        assert all(torch.equal(linear(h), y) for h, y in zip((freed, changed), want, strict=True))
    for h in (freed, changed):
        given = torch.autograd.grad(linear(h).square().sum(), linear.scale_out)
        assert torch.equal(*given, *torch.autograd.grad(linear(h.detach()).square().sum(), linear.scale_out))


def test_a_result_that_was_changed_in_place_is_kept_as_it_is():
    x, linear = torch.randn(5, 12, requires_grad=True), layer()

    def gradient_of_v(change):
        result = F.gelu(x * 1)
        with torch.no_grad():  # the graph does not show it
            change(result)
        return torch.autograd.grad(linear(result).sum(), linear.scale_in)[0]

    assert torch.equal(gradient_of_v(lambda t: t.mul_(0)), torch.zeros(1, 12))
    assert gradient_of_v(lambda t: None).abs().min() > 0


def test_what_the_operation_keeps_may_not_be_changed_in_place():
    x, linear = torch.randn(5, 12, requires_grad=True), layer()
    h = x * 1
    y = linear(F.gelu(h))
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_and_offloading(reentrant):
    x, linear, norm = torch.randn(5, 12, requires_grad=True), layer(), SSFLayerNorm(8)
    trained = (x, *(p for p in (*linear.parameters(), *norm.parameters()) if p.requires_grad))
    last = FusedRLRRLinear(8, 4)

    runs = []

    def run(x):
        runs.append(x)
        return last(F.gelu(norm(linear(F.gelu(x * 1)))))

    def gradients(y):
        for p in trained:
            p.grad = None
        y.square().sum().backward()
        return [p.grad.clone() for p in trained]

    expected = gradients(run(x))
    runs.clear()
    y = checkpoint(run, x, use_reentrant=reentrant)
    assert len(runs) == 1
    got = gradients(y)
    assert len(runs) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with torch.autograd.graph.save_on_cpu():
        y = run(x)
    assert all(torch.equal(a, b) for a, b in zip(gradients(y), expected, strict=True))


@pytest.mark.parametrize("before", ["gelu", "layer norm"])
def test_second_derivatives(before):
    linear = layer(torch.float64)
    trained = linear.scale_out, linear.scale_in, linear.shift
    norm = SSFLayerNorm(12, dtype=torch.float64)
    operation = F.gelu if before == "gelu" else norm
    x = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)

    def function(x, *values):
        named = dict(zip(("scale_out", "scale_in", "shift"), values, strict=True))
        return torch.func.functional_call(linear, named, (operation(x * 1),))

    assert torch.autograd.gradgradcheck(function, (x, *(p.detach().requires_grad_() for p in trained)))


def test_a_second_derivative_with_respect_to_the_input_itself():
    linear = layer(torch.float64)
    result = F.gelu(torch.randn(2, 12, dtype=torch.float64, requires_grad=True) * 1)
    (dv,) = torch.autograd.grad(linear(result).square().sum(), linear.scale_in, create_graph=True)
    (got,) = torch.autograd.grad(dv.sum(), result)
    leaf = result.detach().requires_grad_()
    (dv,) = torch.autograd.grad(linear(leaf).square().sum(), linear.scale_in, create_graph=True)
    (expected,) = torch.autograd.grad(dv.sum(), leaf)
    torch.testing.assert_close(got, expected)


def test_a_block_of_a_vision_transformer_keeps_each_activation_once():
    """h of the MLP, q, k, v, the attention's result, and the residual stream before each norm: no more of M rows."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    model = apply_rlrr(model)
    results = []
    for module in (model.blocks[0].norm1, model.blocks[0].norm2, model.blocks[0].mlp.act):
        module.register_forward_hook(
            lambda m, i, out: results.append((out.dtype, StorageWeakRef(out.untyped_storage())))
        )
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 32, 32))
    assert [dtype for dtype, _ in results] == [torch.bfloat16] * 3
    assert all(storage.expired() for _, storage in results)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_compiled_the_gradients_are_the_same():
    x, linear, norm = torch.randn(5, 12, requires_grad=True), layer(), BEFORE["layer norm"]
    compiled = torch.compile(nn.Sequential(norm, nn.GELU(), linear), backend="aot_eager", fullgraph=True)
    y = compiled(x * 1)
    (got,) = torch.autograd.grad(y.sum(), linear.scale_in)
    (expected,) = torch.autograd.grad(linear(F.gelu(norm(x * 1))).sum(), linear.scale_in)
    torch.testing.assert_close(got, expected)
