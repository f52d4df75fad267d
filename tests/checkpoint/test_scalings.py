"""The scaling of each layer is part of an adapter, also where it is not the one of the config."""

import json

import pytest
import torch
from torch import nn

from rlrr_kernels import FusedRLRRLinear, apply_rlrr, load_adapter, save_adapter
from rlrr_kernels.analysis import linear_weights, rlrr_adapter, rlrr_of_model
from rlrr_kernels.checkpoint import CONFIG
from rlrr_kernels.checkpoint.manifest import Manifest
from tests.checkpoint.test_adapter import assert_untouched, edit, values_of
from tests.small_models import stir

X = torch.linspace(-1, 1, 12).view(3, 4)


def plain():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})


def by_hand(scaling=1.0):
    model = plain()
    model["a"] = FusedRLRRLinear.from_linear(model["a"], rank=2, scaling=scaling)
    return model


def adapted(scaling=0.5):
    return apply_rlrr(plain(), target_modules=["a", "b"], rank=2, scaling=scaling, train_head=False)


def assert_same_function(model, other):
    assert all(torch.equal(model[name](X), other[name](X)) for name in "ab")


def test_a_layer_built_by_hand_is_loaded_with_its_scaling_only(tmp_path):
    model = stir(by_hand(0.25))
    save_adapter(model, tmp_path)
    other = by_hand()
    before = values_of(other)
    with pytest.raises(ValueError, match=r"scaling 0\.25, and the model's a has rank 2 and scaling 1;"):
        load_adapter(other, tmp_path)
    assert_untouched(other, before)
    assert_same_function(load_adapter(by_hand(0.25), tmp_path), model)


def test_a_model_that_is_one_layer_has_its_scaling_too(tmp_path):
    save_adapter(by_hand(0.25)["a"], tmp_path)
    with pytest.raises(ValueError, match=r"scaling 0\.25, and the model's layer has rank 2 and scaling 1;"):
        load_adapter(by_hand()["a"], tmp_path)


def test_a_scaling_of_1_is_one_too(tmp_path):
    save_adapter(stir(by_hand()), tmp_path)
    with pytest.raises(ValueError, match=r"scaling 1, and the model's a has rank 2 and scaling 0\.25;"):
        load_adapter(by_hand(0.25), tmp_path)


@pytest.mark.parametrize("changed", [0.125, 1])
def test_a_scaling_changed_after_apply_rlrr_makes_the_round_trip(tmp_path, changed):
    model = stir(adapted())
    model["a"].scaling = changed
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["scalings"] == {"a": changed}
    other = load_adapter(plain(), tmp_path)
    assert (other["a"].scaling, other["b"].scaling) == (changed, 0.5)
    assert_same_function(other, model)
    with pytest.raises(ValueError, match=rf"scaling {changed}, and the model's a has rank 2 and scaling 0\.5;"):
        load_adapter(adapted(), tmp_path)


@pytest.mark.parametrize("make", [lambda: by_hand(0.25), adapted])
def test_the_analysis_of_the_file_and_of_the_model_agree_with_the_merged_weight(tmp_path, make):
    model = stir(make())
    model["a"].scaling = 0.125
    save_adapter(model, tmp_path)
    base, of_model = rlrr_of_model(model)
    of_file = rlrr_adapter(tmp_path, linear_weights(plain()))
    assert of_file.updates.keys() == of_model.updates.keys()
    for name, update in of_file.updates.items():
        merged = update(base[name])
        assert torch.equal(merged, of_model.updates[name](base[name]))
        assert torch.allclose(merged.float(), model[name].merged_weight()[0], atol=1e-6)


@pytest.mark.parametrize(("make", "same"), [(lambda: by_hand(0.25), lambda: by_hand(0.25)), (adapted, plain)])
def test_adapters_from_before_scalings_were_saved_load_as_they_did(tmp_path, make, same):
    model = stir(make())
    save_adapter(model, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    del values["scalings"]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert_same_function(load_adapter(same(), tmp_path), model)


def test_another_scaling_is_another_configuration(tmp_path):
    model = stir(by_hand(0.25))
    save_adapter(model, tmp_path)
    save_adapter(model, tmp_path)
    model["a"].scaling = 0.5
    with pytest.raises(FileExistsError, match="another configuration"):
        save_adapter(model, tmp_path)
    assert Manifest.read(tmp_path).scalings == {"a": 0.25}


@pytest.mark.parametrize(
    ("scalings", "words"),
    [
        (None, "scalings: expected dict, got None"),
        ([1], r"scalings: expected dict, got \[1\]"),
        ({"a": "1"}, "scalings: 'a': scaling: expected a float, got str"),
        ({"a": True}, "scalings: 'a': scaling: expected a float, got bool"),
        ({"a": 0}, "scalings: 'a': scaling: expected a finite number above 0, got 0"),
        ({"a": float("inf")}, "scalings: 'a': scaling: expected a finite number above 0, got inf"),
        ({"a": float("nan")}, "scalings: 'a': scaling: expected a finite number above 0, got nan"),
        ({"a": 10**400}, "scalings: 'a': scaling: expected a finite number above 0, got 1000"),
        ({"c\x1b": 2}, r"does not fit the model: unexpected scaling of 'c\\x1b'"),
    ],
)
def test_bad_scalings_in_a_file_are_refused_and_change_nothing(tmp_path, scalings, words):
    save_adapter(stir(adapted()), tmp_path)
    edit(tmp_path, scalings=scalings)
    model = plain()
    before = values_of(model)
    with pytest.raises(ValueError, match=words) as caught:
        load_adapter(model, tmp_path)
    assert "\x1b" not in str(caught.value)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [0, float("nan"), "2", torch.tensor(2.0)])
def test_a_layer_with_a_bad_scaling_is_not_saved(tmp_path, value):
    model = by_hand()
    model["a"].scaling = value
    with pytest.raises(ValueError, match="scalings: 'a': scaling: expected a f"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
