"""The options of RLRR in PEFT: what is refused by name, and what numbers become."""

import re

import numpy as np
import pytest
from torch import nn

from tests.small_models import small_vit

peft = pytest.importorskip("peft", minversion="0.20")

from rlrr_kernels.peft import RlrrConfig, RlrrLinear  # noqa: E402
from tests.peft.test_method import VIT, linear, model_of  # noqa: E402


def test_what_it_cannot_adapt_is_refused():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer, message in [
        (nn.Conv2d(3, 4, 1), "0: expected a plain nn.Linear, got .*Conv2d"),
        (Own(4, 4), "0: expected a plain nn.Linear, got .*Own, whose forward is its own"),
    ]:
        with pytest.raises(TypeError, match=message):
            peft.get_peft_model(nn.Sequential(layer), RlrrConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"out_proj: nn\.MultiheadAttention reads the weight"):
        peft.get_peft_model(nn.Sequential(nn.MultiheadAttention(4, 2)), RlrrConfig(target_modules=["out_proj"]))
    for config, field in (({"groups": 5}, "groups"), ({"groups_pattern": {r"\d": 5}}, r"groups_pattern['\\d']")):
        message = f"0: {field}: expected a divisor of out_features = 24, got 5"
        for configs in ([config], [{}, config]):  # a new layer, and a further adapter
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                model_of(*configs)


def test_ranks_by_pattern_and_a_repr_that_names_the_method():
    model = peft.get_peft_model(small_vit(), RlrrConfig(r=2, rank_pattern={r"blocks\.1\.mlp\.fc1": 5}, **VIT))
    fc1 = [block.mlp.fc1 for block in model.base_model.model.blocks]
    assert [layer.r["default"] for layer in fc1] == [2, 5]
    assert isinstance(fc1[0], RlrrLinear)
    assert repr(fc1[0]).startswith("rlrr.RlrrLinear(")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"groups": "3"}, TypeError, "groups: expected an int, got str"),
        ({"groups": 2.0}, TypeError, "groups: expected an int, got float"),
        ({"groups": 0}, ValueError, "groups: expected 1 or more, got 0"),
        ({"rank_pattern": ["a"]}, TypeError, "rank_pattern: expected a dict, got list"),
        ({"rank_pattern": {"a": 0}}, ValueError, r"rank_pattern\['a'\]: expected 1 to 128, got 0"),
        ({"rank_pattern": {"qkv": 129}}, ValueError, r"rank_pattern\['qkv'\]: expected 1 to 128, got 129"),
        ({"groups_pattern": {"a": "b"}}, TypeError, r"groups_pattern\['a'\]: expected an int, got str"),
        ({"r": 129}, ValueError, "r: expected 1 to 128, got 129"),
        ({"r": 0}, ValueError, "r: expected 1 to 128, got 0"),
        ({"scaling": "1"}, TypeError, "scaling: expected a float, got str"),
        (
            {"init_weights": "gaussian"},
            ValueError,
            "init_weights: expected True, False, 'identity' or 'paper', got 'gaussian'",
        ),
        (
            {"target_modules": "qkv", "layers_to_transform": 1},
            ValueError,
            "layers_to_transform, layers_pattern: expected none with a target_modules of type str",
        ),
    ],
)
def test_a_wrong_option_is_named(options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        RlrrConfig(**options)


def test_numbers_of_numpy_are_numbers(tmp_path):
    two = np.int64(2)
    numbers = {"r": two, "scaling": np.float32(0.5), "groups": two, "rank_pattern": {"a": two}}
    config = RlrrConfig(target_modules=["0"], groups_pattern={"a": two}, **numbers)
    peft.get_peft_model(nn.Sequential(linear()), config).save_pretrained(tmp_path)  # JSON takes Python's numbers only
    loaded = RlrrConfig.from_pretrained(tmp_path)
    assert (loaded.r, loaded.scaling, loaded.groups) == (2, 0.5, 2)
    assert loaded.rank_pattern == loaded.groups_pattern == {"a": 2}
