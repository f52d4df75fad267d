"""Weights in and out of layers and models: strict both ways, assigned, averaged, pickled."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from rlrr_kernels import FusedRLRRLinear, apply_rlrr, disable_adapter, merge, merge_and_unload, unmerge
from tests.small_models import X, small_swin, small_vit, stir, tuned


def other(make=small_vit):
    """The same family with other weights."""
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("make", [small_vit, small_swin])
@pytest.mark.parametrize("assign", [False, True])
def test_a_strict_load_of_an_adapted_state_dict_gives_the_same_model(make, assign):
    source, target = tuned(make), apply_rlrr(other(make))
    flags = {name: p.requires_grad for name, p in target.named_parameters()}
    result = target.load_state_dict(source.state_dict(), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert equal(target.state_dict(), source.state_dict())
    assert torch.equal(target(X), source(X))
    assert {name: p.requires_grad for name, p in target.named_parameters()} == flags


def test_a_model_on_the_meta_device_is_filled_by_assigning():
    source = tuned()
    with torch.device("meta"):
        target = apply_rlrr(small_vit())
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(X), source(X))
    target(X).sum().backward()
    assert target.blocks[0].attn.qkv.scale_in.grad.any()


def test_a_strict_load_of_a_plain_checkpoint_names_what_trains_as_missing():
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "scale_out", "scale_in", "shift"'):
        FusedRLRRLinear(8, 6).load_state_dict(nn.Linear(8, 6).state_dict())


@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_a_plain_checkpoint_loads_with_strict_false_and_leaves_what_trains(make):
    model, plain = tuned(make), other(make)
    # the head is a plain module that the checkpoint has
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad and "head" not in n}
    result = model.load_state_dict(plain.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == list(trained)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in trained.items())
    with disable_adapter(model):
        rest = {name: value for name, value in model.state_dict().items() if name not in trained and "head" not in name}
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in rest.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda sd: {f"_orig_mod.{name}": value for name, value in sd.items()}, 'Unexpected .*"_orig_mod.weight"'),
        (lambda sd: {name: value for name, value in sd.items() if name != "shift"}, r'Missing .*: "shift"\. $'),
        (lambda sd: sd | {"rlrr_u": sd["scale_out"]}, 'Unexpected .*: "rlrr_u"'),
        (lambda sd: sd | {"scale_in": sd["scale_in"].expand(3, 1, 8)}, r"size mismatch for scale_in: .*\[3, 1, 8\]"),
        (lambda sd: sd | {"scale_out": sd["scale_out"].view(-1)}, r"size mismatch for scale_out: .*\[6\]"),
    ],
    ids=["prefix", "one missing", "renamed", "other groups", "flat"],
)
def test_other_keys_and_shapes_get_pytorchs_own_words(change, words):
    layer = FusedRLRRLinear(8, 6)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=words):
        layer.load_state_dict(change(FusedRLRRLinear(8, 6).state_dict()))
    assert {n: v.shape for n, v in layer.state_dict().items()} == {n: v.shape for n, v in before.items()}


def test_an_adapted_state_dict_goes_into_a_plain_model_once_it_is_merged():
    model, plain = tuned(), small_vit()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*blocks.0.attn.qkv.scale_out"):
        plain.load_state_dict(model.state_dict())
    expected = model(X)
    plain.load_state_dict(merge_and_unload(model).state_dict())
    torch.testing.assert_close(plain(X), expected)


@pytest.mark.parametrize("options", [{}, {"strict": False}, {"assign": True}], ids=str)
def test_nothing_is_loaded_into_the_layers_of_a_merged_model_and_the_error_says_so_once(options):
    model = merge(tuned())
    before = {name: value.clone() for name, value in model.state_dict().items() if ".attn." in name or ".mlp." in name}
    with pytest.raises(RuntimeError) as caught:
        model.load_state_dict(apply_rlrr(other()).state_dict(), **options)
    assert str(caught.value).count("merged") == 1
    assert str(caught.value).endswith("model: it is merged; unmerge before loading")
    after = unmerge(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_state_dict_of_a_model_merged_without_a_copy_names_the_layer():
    model = merge(tuned(), keep=False)
    with pytest.raises(RuntimeError, match=r"^blocks\.0\.attn\.qkv: the frozen weight was not kept when merging"):
        model.state_dict()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_pickles_of_whole_modules_compute_the_same_and_can_be_unmerged(make, merged):
    model = tuned(make)
    before = copy.deepcopy(model.state_dict())
    if merged:
        merge(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
        assert equal((unmerge(twin) if merged else twin).state_dict(), before)
        assert twin.rlrr_config == model.rlrr_config
        with disable_adapter(twin), disable_adapter(model):
            assert torch.equal(twin(X), model(X))


def test_a_state_dict_is_read_with_weights_only():
    file = io.BytesIO()
    torch.save(merge(tuned()).state_dict(), file)
    file.seek(0)
    model = apply_rlrr(other())
    model.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(X), tuned()(X))


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.75)}], ids=["mean", "ema"])
def test_averaged_models_average_what_trains_and_keep_the_frozen_bits(average):
    model = tuned()
    averaged = AveragedModel(model, **average)
    averaged.update_parameters(model)  # the first is a copy
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    stir(model)
    averaged.update_parameters(model)
    share = 0.25 if average else 0.5
    for (name, p), q in zip(model.named_parameters(), averaged.module.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q, torch.lerp(first[name], p, share))
        else:
            assert torch.equal(q, first[name]), name
    twin = AveragedModel(apply_rlrr(other()), **average)
    twin.load_state_dict(averaged.state_dict())
    assert torch.equal(twin(X), averaged(X))
    assert torch.equal(unmerge(merge(averaged.module))(X), twin(X))


def test_state_holds_tensors_alone_and_follows_keep_vars():
    layer = FusedRLRRLinear(8, 6, groups=3)
    for treat in (lambda: None, partial(layer.merge)):
        treat()
        state = layer.state_dict(keep_vars=True)
        assert list(state) == ["weight", "bias", "scale_out", "scale_in", "shift"]
        assert all(isinstance(value, nn.Parameter) for value in state.values())
        assert not any(value.requires_grad for value in layer.state_dict().values())
    layer.unmerge()
    assert state["weight"] is layer.weight
