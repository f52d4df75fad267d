"""Autograd around the layer: checkpointing, accumulation, hooks, subsets, second derivatives, threads."""

import functools
import itertools
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from rlrr_kernels import FusedRLRRLinear, SSFAffine, SSFLayerNorm, apply_rlrr, rescaled_linear, use_backend
from rlrr_kernels.backends import reference
from rlrr_kernels.ops import linear
from tests.oracle import make_problem
from tests.small_models import X, small_vit, stir

NAMES = ("x", "weight", "scale_out", "scale_in", "bias", "shift")
SUBSETS = [s for n in range(1, 7) for s in itertools.combinations(range(6), n)]


def leaves(dtype=torch.float32, needs=range(6), rank=1):
    p = make_problem(5, 6, 4, 3, dtype, rank=rank)
    return [t.clone().requires_grad_(i in needs) for i, t in enumerate(p.forward_args)]


def gradients(tensors, f=rescaled_linear, **options):
    y = f(*tensors)
    return torch.autograd.grad(y, [t for t in tensors if t.requires_grad], y.detach().cos(), **options)


def assert_equal(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def model():
    """A small ViT whose dropout shows whether the random state is kept."""
    return stir(apply_rlrr(small_vit(proj_drop_rate=0.3))).train()


def step(model, run=None):
    torch.manual_seed(3)
    trained = [p for p in model.parameters() if p.requires_grad]
    y = (run or model)(X.clone().requires_grad_())
    model.zero_grad()
    y.square().sum().backward()
    return [y, *(p.grad for p in trained)]


@pytest.mark.parametrize("reentrant", [True, False, None])
def test_checkpointing_gives_the_same_bits(model, reentrant):
    """None: timm's own."""

    def blocks(x):
        x = model.pos_drop(model._pos_embed(model.patch_embed(x)))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant, preserve_rng_state=True)
        return model.forward_head(model.norm(x))

    plain = step(model)
    assert not torch.equal(plain[0], (torch.manual_seed(4), model(X))[1]), "dropout is on"
    model.set_grad_checkpointing(reentrant is None)
    assert_equal(step(model, model if reentrant is None else blocks), plain)


def test_selective_checkpointing_can_keep_the_layers_result():
    op = torch.ops.rlrr.forward.default
    ran = []
    counting = SimpleNamespace(
        forward=lambda *a: (ran.append("forward"), reference.forward(*a))[1],
        grad_input=reference.grad_input,
        grad_scales=reference.grad_scales,
    )
    for kept, runs in (([op], 1), ([], 2)):
        tensors, contexts = leaves(), functools.partial(create_selective_checkpoint_contexts, kept)
        ran.clear()
        with mock.patch.object(linear, "_backend", return_value=counting):
            run = functools.partial(checkpoint, rescaled_linear, use_reentrant=False, context_fn=contexts)
            got = gradients(tensors, run)
        assert len(ran) == runs
        with use_backend("reference"):
            assert_equal(got, gradients(tensors))


def test_accumulated_gradients_are_those_of_the_large_batch():
    tensors = leaves(torch.float64)
    x, *parameters = tensors
    rescaled_linear(*tensors).sin().sum().backward()
    whole = [t.grad.clone() for t in tensors]
    for t in tensors:
        t.grad = None
    for rows in x.split(2):
        rescaled_linear(rows, *parameters).sin().sum().backward()
    for t, right in zip(tensors, whole, strict=True):
        torch.testing.assert_close(t.grad, right, rtol=1e-13, atol=1e-13)  # float64 sums in another order


def test_a_second_backward_needs_retain_graph_as_nn_linear_does():
    words = []
    for y in (rescaled_linear(*leaves()), nn.Linear(4, 6)(torch.randn(5, 4))):
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time") as caught:
            y.sum().backward()
        words.append(str(caught.value))
    assert words[0] == words[1]
    tensors = leaves()
    y = rescaled_linear(*tensors)
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    assert_equal(torch.autograd.grad(y.sum(), tensors), first)


@pytest.mark.parametrize("changed", range(6), ids=NAMES)
def test_what_was_changed_in_place_after_forward_is_an_error_where_backward_reads_it(changed):
    tensors = leaves()
    y = rescaled_linear(*tensors)
    with torch.no_grad():
        tensors[changed].add_(1)
    if NAMES[changed] in ("bias", "shift"):
        y.sum().backward()
        assert torch.equal(tensors[changed].grad, torch.full((6,), 5.0))
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_subset_are_those_of_all(dtype):
    everything = gradients(leaves(dtype))
    for needs in SUBSETS:
        right = [everything[i] for i in needs]
        assert_equal(gradients(leaves(dtype, needs)), right)
        tensors = leaves(dtype)
        y = rescaled_linear(*tensors)
        assert_equal(torch.autograd.grad(y, [tensors[i] for i in needs], y.detach().cos()), right)


def test_on_the_meta_device_every_derivative_has_its_shape():
    tensors = [t.detach().to("meta").requires_grad_() for t in leaves()]
    for create_graph in (False, True):
        found = gradients(tensors, create_graph=create_graph)
        assert [(g.shape, g.is_meta) for g in found] == [(t.shape, True) for t in tensors]
    second = torch.autograd.grad(sum(g.sum() for g in found), tensors[:4])
    assert [g.shape for g in second] == [t.shape for t in tensors[:4]]
    x = torch.empty(5, 4, device="meta")
    assert torch.func.vmap(FusedRLRRLinear(4, 6, device="meta"))(x).shape == (5, 6)
    for norm in (SSFLayerNorm(4, device="meta"), SSFAffine(4, device="meta")):
        assert norm(x).shape == (5, 4)


@pytest.mark.parametrize(
    "needs",
    [needs if len(needs) in (1, 6) else pytest.param(needs, marks=pytest.mark.slow) for needs in SUBSETS],
    ids=str,
)
def test_second_derivatives_of_any_subset(needs):
    assert torch.autograd.gradgradcheck(rescaled_linear, leaves(torch.float64, needs))


def test_second_derivatives_at_rank_3():
    assert torch.autograd.gradgradcheck(rescaled_linear, leaves(torch.float64, rank=3))


@pytest.mark.parametrize("needs", [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_second_derivatives_of_ssf_layer_norm(needs, affine):
    norm = SSFLayerNorm(6, elementwise_affine=affine, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    given = [t.detach().requires_grad_(i in needs) for i, t in enumerate((x, norm.ssf_scale, norm.ssf_shift))]

    def call(x, s, t):
        return torch.func.functional_call(norm, {"ssf_scale": s, "ssf_shift": t}, (x,))

    def own_ops(x, s, t):  # those that a GPU and 16-bit rows take
        from rlrr_kernels.ops.layer_norm import _AffineLayerNorm

        return _AffineLayerNorm.apply(x, norm.weight, norm.bias, s, t, norm.eps, x.dtype)

    for f in (call, own_ops):
        assert torch.autograd.gradcheck(f, given)
        assert torch.autograd.gradgradcheck(f, given)


def test_gradients_of_the_result_that_are_zero_expanded_strided_or_undefined():
    class Undefined(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    tensors = leaves()
    shape = rescaled_linear(*tensors).shape
    zeros = [torch.zeros_like(t) for t in tensors]
    assert_equal(torch.autograd.grad(rescaled_linear(*tensors), tensors, torch._efficientzerotensor(shape)), zeros)
    got = torch.autograd.grad(Undefined.apply(rescaled_linear(*tensors)).sum(), tensors, materialize_grads=True)
    assert_equal(got, zeros)
    ones = torch.autograd.grad(rescaled_linear(*tensors), tensors, torch.ones(shape))
    for dy in (torch.ones(1, 1).expand(shape), torch.ones(shape[::-1]).mT, torch.ones(5, 12)[:, ::2]):
        for ours, theirs in zip(torch.autograd.grad(rescaled_linear(*tensors), tensors, dy), ones, strict=True):
            torch.testing.assert_close(ours, theirs)  # strides may change the order of a sum


def test_hooks_may_change_gradients():
    torch.manual_seed(0)
    layer, x = FusedRLRRLinear(4, 6), torch.randn(3, 4, requires_grad=True)
    inputs = (x, layer.scale_out, layer.scale_in, layer.shift)
    right = torch.autograd.grad(layer(x).sum(), inputs)
    seen = []

    def negate(parameter):
        parameter.grad.neg_()

    layer.register_full_backward_pre_hook(lambda module, dy: (2 * dy[0],))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0], dy[0])))
    layer.scale_in.register_hook(lambda g: 4 * g)
    layer.shift.register_post_accumulate_grad_hook(negate)
    layer(x).sum().backward()
    factors = (2, 2, 8, -2)
    # powers of two: exact
    assert_equal([t.grad for t in inputs], [k * g for k, g in zip(factors, right, strict=True)])
    ((dx, dy),) = seen
    assert_equal((dx, dy), (x.grad, torch.full((3, 6), 2.0)))


def test_saved_tensors_may_be_packed():
    tensors = leaves()
    right = gradients(tensors)
    with save_on_cpu():
        assert_equal(gradients(tensors), right)
    packed = []
    with saved_tensors_hooks(lambda t: (packed.append(t), t.half())[1], lambda t: t.float()):
        y = rescaled_linear(*tensors)
    assert [t.shape for t in packed] == [t.shape for t in tensors[:4]], "x, W, u and v, nothing else"
    rounded = [t.detach().half().float().requires_grad_() for t in tensors]
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, tensors, dy)
    assert_equal(got, torch.autograd.grad(rescaled_linear(*rounded), rounded, dy))
    assert not torch.equal(got[0], torch.autograd.grad(rescaled_linear(*tensors), tensors, dy)[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode_save_nothing(mode):
    """Neither as saved tensors nor by a reference in a graph."""
    saved = []
    for layer in (FusedRLRRLinear(8, 6), SSFLayerNorm(8), SSFLayerNorm(8).bfloat16()):
        x = torch.randn(5, 8, dtype=layer.weight.dtype, requires_grad=True)
        with saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            with mode():
                y = layer(x)
            assert (y.grad_fn, y.requires_grad, saved) == (None, False, [])
            layer(x)
        assert saved, "training saves tensors"
        saved.clear()


def test_inference_tensors_behave_as_in_nn_linear():
    with torch.inference_mode():
        x = torch.randn(5, 4)
    tensors = leaves()[1:]
    with torch.no_grad():
        assert torch.equal(rescaled_linear(x, *tensors), rescaled_linear(x.clone(), *tensors))
    for call in (lambda: rescaled_linear(x, *tensors), lambda: nn.functional.linear(x, tensors[0])):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            call()
    shift = tensors[-1]
    frozen = [t.detach() for t in tensors[:-1]]
    with torch.no_grad():
        right = rescaled_linear(x, *frozen, shift)
    assert torch.equal(rescaled_linear(x, *frozen[:-1], frozen[-1], shift.detach()), right)


def test_anomaly_mode_names_the_nan_and_changes_nothing_else():
    tensors = leaves()
    right = gradients(tensors)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_equal(gradients(tensors), right)
        y = rescaled_linear(*tensors)
        with pytest.raises(RuntimeError, match=r"_RescaledLinearBackward.*returned nan"):
            y.backward(torch.full_like(y, float("nan")))


def test_threads_share_a_graph_and_accumulate():
    tensors = leaves(torch.float64)
    y = rescaled_linear(*tensors)
    right = torch.autograd.grad(y, tensors, y.detach().cos(), retain_graph=True)
    failures = []

    def backward():
        try:
            for _ in range(5):
                y.backward(y.detach().cos(), retain_graph=True)
        except RuntimeError as error:
            failures.append(error)

    threads = [threading.Thread(target=backward) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for t, one in zip(tensors, right, strict=True):
        torch.testing.assert_close(t.grad, 40 * one, rtol=1e-12, atol=1e-12)  # 40 float64 sums
