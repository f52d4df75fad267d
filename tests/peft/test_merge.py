"""Merging RLRR adapters in PEFT, and putting the frozen layer back."""

import copy

import pytest
import torch

from tests.oracle import assert_close

peft = pytest.importorskip("peft", minversion="0.20")

from tests.peft.test_method import ROWS, expected, model_of  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_merged_and_put_back_bit_for_bit(kind, dtype):
    model = model_of({"r": 2, "groups": 2}, {"r": 3}, kind=kind, dtype=dtype)
    base, x = model.base_model.model[0].base_layer, ROWS.to(dtype)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    y = model(x)
    # computed before W is replaced
    one, both = ([expected(model, names, x, t) for t in (dtype, torch.float64)] for names in (["1"], ["default", "1"]))
    model.merge_adapter(["1"])
    assert_close("one", model(x), *one)
    model.merge_adapter(["default"])  # from the frozen W: nothing is rounded twice
    assert_close("both", model(x), *both)
    assert base.bias is not None
    model.unmerge_adapter()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], t) for name, t in before.items())
    assert torch.equal(model(x), y)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert type(merged[0]) is type(base)
    assert_close("unloaded", merged(x), *both)


def test_a_merge_of_what_is_not_finite_changes_nothing():
    model = model_of({}, {"r": 2})
    base = model.base_model.model[0].base_layer
    weight = base.weight.clone()
    model.base_model.model[0].rlrr_scale_out["1"].data[3] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(["1"], safe_merge=True)
    assert torch.equal(base.weight, weight)
    assert not model.base_model.model[0].merged


def test_what_was_merged_in_inference_mode_can_be_part_of_a_backward_pass():
    model = model_of({"r": 2})
    for change in (model.merge_adapter, model.unmerge_adapter):
        with torch.inference_mode():
            change()
        rows = ROWS.clone().requires_grad_()
        model(rows).sum().backward()
        assert rows.grad.abs().min() > 0


def test_merging_leaves_the_bias_the_same_parameter():
    model = model_of({"r": 1})
    base = model.base_model.model[0].base_layer
    bias, before = base.bias, base.bias.detach().clone()
    model.merge_adapter()
    assert base.bias is bias
    assert not torch.equal(bias, before)
    model.unmerge_adapter()
    assert base.bias is bias
    assert torch.equal(bias, before)


def test_merged_shifts_that_cancel_leave_no_bias():
    model = model_of({}, {}, kind="no bias", dtype=torch.float64)
    layer = model.base_model.model[0]
    layer.rlrr_shift["1"].data = -layer.rlrr_shift["default"].data
    y = expected(model, ["default", "1"], ROWS.double(), torch.float64)
    model.merge_adapter(["default"])
    assert layer.base_layer.bias is not None
    model.merge_adapter(["1"])
    torch.testing.assert_close(model(ROWS.double()), y)
    assert layer.base_layer.bias is None


def test_ranks_that_add_up_to_too_many_can_be_merged_alone():
    model = model_of({"r": 100}, {"r": 100}, dtype=torch.float64)
    y = expected(model, ["default", "1"], ROWS.double(), torch.float64)
    model.merge_adapter()
    torch.testing.assert_close(model(ROWS.double()), y)
