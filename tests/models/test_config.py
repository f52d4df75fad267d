"""RLRRConfig: checked when made, and written to JSON and back."""

import json

import pytest
import torch

from rlrr_kernels import RLRRConfig


def test_it_survives_json():
    config = RLRRConfig(
        target_modules=["blocks.*"],
        exclude_modules="head",
        groups={"*.qkv": 3},
        norm_affine=True,
        patch_affine=False,
        init="identity",
        train_head=False,
        frozen_dtype="bfloat16",
        rank=4,
        scaling=0.5,
    )
    assert config.target_modules == ("blocks.*",)
    assert config.exclude_modules == ("head",)
    assert config.frozen_dtype is torch.bfloat16
    assert RLRRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert RLRRConfig.from_dict(json.loads(json.dumps(RLRRConfig().to_dict()))) == RLRRConfig()
    named = RLRRConfig(train_head="decoder.last")
    assert json.loads(json.dumps(named.to_dict()))["train_head"] == ["decoder.last"]
    assert RLRRConfig.from_dict(named.to_dict()) == named


def test_a_function_as_init_is_said_and_not_kept():
    values = RLRRConfig(init=lambda u, v: None).to_dict()
    assert values["init"] == "custom"
    assert RLRRConfig.from_dict(values).init == "paper"


@pytest.mark.parametrize(
    ("values", "kind", "words"),
    [
        ({"target_modules": 3}, TypeError, "target_modules: expected a sequence of names or patterns, got 3"),
        ({"exclude_modules": [1]}, TypeError, "exclude_modules: expected a sequence"),
        ({"exclude_modules": None}, TypeError, "exclude_modules: expected a sequence"),
        ({"groups": {"*.qkv": 0}}, ValueError, r"groups\['\*.qkv'\]: expected 1 or more, got 0"),
        ({"groups": {"*.qkv": True}}, TypeError, r"groups\['\*.qkv'\]: expected an int, got bool"),
        ({"groups": {3: 3}}, TypeError, "groups: expected patterns of type str, got 3"),
        ({"groups": 3}, TypeError, "groups: expected a mapping"),
        ({"norm_affine": 1}, TypeError, "norm_affine: expected one of"),
        ({"train_head": None}, TypeError, "train_head: expected True, False, or names of modules, got None"),
        ({"train_head": []}, TypeError, r"train_head: expected True, False, or names of modules, got \[\]"),
        ({"init": "papr"}, ValueError, "init: expected 'paper', 'identity' or a callable, got 'papr'"),
        ({"frozen_dtype": "int8"}, ValueError, "frozen_dtype: expected one of float16, bfloat16, float32, got 'int8'"),
        ({"frozen_dtype": torch.int8}, ValueError, "frozen_dtype: expected one of"),
        ({"ranks": 3}, ValueError, "RLRRConfig: unknown field 'ranks'"),
        ({"rank": 0}, ValueError, "rank: expected 1 to 128, got 0"),
        ({"rank": True}, TypeError, "rank: expected an int, got bool"),
        ({"scaling": -1.0}, ValueError, "scaling: expected a finite number above 0, got -1.0"),
        ({"scaling": None}, TypeError, "scaling: expected a float, got NoneType"),
    ],
)
def test_bad_values_name_their_field(values, kind, words):
    with pytest.raises(kind, match=words):
        RLRRConfig.from_dict(values)
