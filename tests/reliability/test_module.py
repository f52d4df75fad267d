"""PyTorch's operations on modules: copies, conversions, hooks, wrappers. They work, or raise one clear error."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, RLRRConfig, SSFAffine, SSFLayerNorm, apply_rlrr, merge, unmerge
from rlrr_kernels import merge_and_unload as unload
from tests.small_models import ROWS as x
from tests.small_models import X, small_swin, small_vit, tuned
from tests.small_models import formula_of as formula
from tests.small_models import small_layer as layer


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.out = FusedRLRRLinear(8, 6)
        self.out.weight = self.embedding.weight


# copies


@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_a_deep_copy_of_a_merged_model_unmerges_to_the_same_bits(make):
    model = tuned(make)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = copy.deepcopy(merge(model))
    with torch.no_grad():  # a copy, not a view
        for parameter in [*model.parameters(), *model.state_dict().values()]:
            parameter.zero_()
    after = unmerge(twin).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("merged", [False, True])
def test_ties_to_a_frozen_weight_survive_copies_conversions_and_merging(merged):
    for treat in (copy.deepcopy, lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.share_memory()):
        model = Tied().eval()
        if merged:
            model.out.merge()
        model = treat(model)
        if merged:
            model.out.unmerge()
        assert model.out.weight is model.embedding.weight


# conversions


@pytest.mark.parametrize("mode", ["data", "swap", "overwrite"])
@pytest.mark.parametrize("merged", [False, True])
def test_conversions_there_and_back_keep_every_bit_and_what_trains(mode, merged, monkeypatch):
    future = torch.__future__
    setter = {"swap": "set_swap_module_params_on_conversion", "overwrite": "set_overwrite_module_params_on_conversion"}
    model = tuned(small_swin)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    if merged:
        merge(model)
    if mode != "data":
        getattr(future, setter[mode])(True)
    try:
        model.double().float()
    finally:
        if mode != "data":
            getattr(future, setter[mode])(False)
    if merged:
        unmerge(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trains


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
def test_a_converted_model_computes_and_trains_in_its_dtype(convert):
    model = getattr(tuned(), convert)()
    images = X.to(model.head.weight.dtype)
    logits = model(images)
    assert logits.dtype is images.dtype
    logits.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype is images.dtype and g.isfinite().all() and g.any() for g in gradients)
    assert torch.allclose(logits.float(), tuned()(X), atol=0.05)  # another model would be off by its logits


@pytest.mark.parametrize(
    "make",
    [
        partial(FusedRLRRLinear, 8, 6),
        partial(FusedRLRRLinear, 8, 6, False, groups=3, init="identity"),
        partial(FusedRLRRLinear, 8, 6, init=lambda u, v: (u.fill_(1), v.fill_(2))),
        partial(SSFLayerNorm, 8),
        partial(SSFAffine, 8, init="identity"),
    ],
)
def test_a_layer_made_without_data_is_as_a_fresh_one_after_reset_parameters(make):
    torch.manual_seed(3)
    fresh = make()
    empty = make(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))  # to_empty leaves any values
    torch.manual_seed(3)
    empty.reset_parameters()
    for (name, a), (_, b) in zip(fresh.named_parameters(), empty.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad, name


def test_skip_init_makes_the_layer_without_drawing():
    state = torch.get_rng_state()
    made = nn.utils.skip_init(FusedRLRRLinear, 8, 6, groups=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, p in made.named_parameters() if p.requires_grad] == ["scale_out", "scale_in", "shift"]


def test_a_merged_layer_is_not_reset():
    merged = layer()
    merged.merge()
    with pytest.raises(RuntimeError, match="cannot reset while it is merged; unmerge first"):
        merged.reset_parameters()


def test_shared_memory_holds_the_kept_weights_too():
    model = merge(tuned()).share_memory()
    assert all(p.is_shared() for p in model.parameters())
    assert all(p.is_shared() for p in unmerge(model).parameters())


# names


LINEAR, NORM = ("weight", "bias", "scale_out", "scale_in", "shift"), ("weight", "bias", "ssf_scale", "ssf_shift")
BLOCK = {"norm1": NORM, "attn.qkv": LINEAR, "attn.proj": LINEAR, "norm2": NORM, "mlp.fc1": LINEAR, "mlp.fc2": LINEAR}
NAMES = [
    *("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
    *("patch_embed.norm.ssf_scale", "patch_embed.norm.ssf_shift"),
    *(f"blocks.0.{layer}.{leaf}" for layer, leaves in BLOCK.items() for leaf in leaves),
    *(f"norm.{leaf}" for leaf in NORM),
    *("head.weight", "head.bias"),
]


def test_parameters_keep_their_names_and_order_merged_or_not():
    """Users' checkpoints and optimiser states hold these names: a change here would break them."""
    model = tuned(partial(small_vit, depth=1))
    for treat in (lambda: model, lambda: merge(model), lambda: unmerge(model)):
        treat()
        assert [name for name, _ in model.named_parameters()] == NAMES
        assert list(model.state_dict()) == NAMES


def test_a_layer_without_bias_has_one_while_it_is_merged_and_saves_none():
    made = layer(bias=False)
    names, keys = [n for n, _ in made.named_parameters()], list(made.state_dict())
    made.merge()
    assert sorted({n for n, _ in made.named_parameters()} - set(names)) == ["bias"]
    assert list(made.state_dict()) == keys
    made.unmerge()
    assert [n for n, _ in made.named_parameters()] == names


def test_equal_configs_have_equal_hashes():
    a = RLRRConfig(groups={"a": 3, "b": 1}, target_modules=["a"], frozen_dtype="bfloat16")
    b = RLRRConfig(groups={"b": 1, "a": 3}, target_modules=["a"], frozen_dtype=torch.bfloat16)
    assert a == b
    assert {a: 1}[b] == 1
    assert len({a, b, RLRRConfig(), RLRRConfig(groups={"a": 3})}) == 3


# hooks, subclasses, wrappers


def test_hooks_of_a_layer_stay_when_it_is_replaced_and_can_still_be_removed():
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    plain = model(x)
    seen = []
    handles = [
        model[0].register_forward_pre_hook(lambda m, args: (2 * args[0],)),
        model[0].register_forward_hook(lambda m, args, kwargs, y: y + 1, with_kwargs=True),
        model[0].register_full_backward_hook(lambda m, gi, go: seen.append(type(m))),
        model[1].register_forward_hook(lambda m, args, y: -y),
    ]
    hooked = model(x)
    assert not torch.allclose(hooked, plain)
    for treat, kind in ((partial(apply_rlrr, target_modules=["0"], norm_affine=True), FusedRLRRLinear), (unload, None)):
        if kind:
            treat(model, init="identity")
        else:
            treat(model)
        assert torch.allclose(model(x), hooked, atol=1e-6)
        model(x.clone().requires_grad_()).sum().backward()
        assert seen.pop() is type(model[0]) is (kind or nn.Linear)
    for handle in handles:
        handle.remove()
    assert torch.allclose(model(x), plain, atol=1e-6)


def test_module_hooks_see_the_layers_tensors():
    made, seen = layer(), {}
    made.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    made.register_forward_hook(lambda m, args, y: seen.update(y=y))
    made.register_full_backward_pre_hook(lambda m, go: seen.update(dy=go[0]))
    made.register_full_backward_hook(lambda m, gi, go: seen.update(dx=gi[0]))
    given = x.clone().requires_grad_()
    y = made(given)
    y.square().sum().backward()
    assert torch.equal(seen["x"], x)
    assert torch.equal(seen["y"], y)
    assert torch.equal(seen["dy"], 2 * y)
    assert torch.equal(seen["dx"], given.grad)


def test_a_subclass_of_the_layer_is_kept_by_from_linear_and_merged_as_one():
    class Scaled(FusedRLRRLinear):
        pass

    model = nn.Sequential(Scaled.from_linear(nn.Linear(8, 6))).eval()
    assert type(model[0]) is Scaled
    y = model(x)
    assert torch.allclose(merge(model)(x), y, atol=1e-6)
    assert torch.equal(unmerge(model)(x), y)


def test_a_layer_is_freed_when_nothing_holds_it():
    made = layer()
    made(x).sum().backward()
    made.merge()
    held = [weakref.ref(made), weakref.ref(made.weight), weakref.ref(made.scale_out)]
    del made
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_requires_grad_switches_the_frozen_weight_on_and_off():
    made = layer(groups=3).requires_grad_(True)
    made(x).square().sum().backward()
    expected = torch.autograd.grad(formula(made).square().sum(), [made.weight, made.bias])
    assert torch.allclose(made.weight.grad, expected[0], rtol=1e-5, atol=1e-5)
    assert torch.allclose(made.bias.grad, expected[1], rtol=1e-5, atol=1e-5)
    made.requires_grad_(False)
    assert not made(x).requires_grad


def test_replicas_of_data_parallel_share_the_parameters():
    made = layer().eval()
    for merged in (False, True):
        if merged:
            made.merge()
        twin = made._replicate_for_data_parallel()
        for name, parameter in made.named_parameters():  # what torch.nn.parallel.replicate puts there
            setattr(twin, name, parameter.detach().clone())
        assert torch.equal(twin(x), made(x))


def test_modules_are_compiled_in_place_and_keep_their_names():
    model = tuned(partial(small_vit, depth=1))
    y = model(X)
    for module in model.blocks:
        module.compile(backend="eager")
    assert torch.allclose(model(X), y, atol=1e-6)
    assert list(model.state_dict()) == NAMES
    wrapped = torch.compile(model, backend="eager")
    assert list(wrapped.state_dict()) == ["_orig_mod." + name for name in NAMES]
    assert list(copy.deepcopy(model).state_dict()) == NAMES


def test_repr_shows_the_state_of_a_layer():
    made = layer(groups=3)
    made.enabled = False
    made.merge()
    assert repr(made).endswith("bias=True, groups=3, init=paper, disabled, merged)")
