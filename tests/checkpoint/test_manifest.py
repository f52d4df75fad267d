"""adapter_config.json: what it says, which base models it lets pass, and what is refused."""

import json
import re

import pytest
import torch
from torch import nn

from rlrr_kernels import RLRRConfig, count_parameters
from rlrr_kernels.checkpoint import CONFIG, load_adapter, save_adapter
from rlrr_kernels.checkpoint.manifest import Manifest
from tests.checkpoint.test_adapter import assert_untouched, edit, tuned, values_of
from tests.small_models import small_swin, small_vit


@pytest.fixture
def folder(tmp_path):
    save_adapter(tuned(), tmp_path / "an adapter")
    return tmp_path / "an adapter"


def test_the_configuration_says_what_it_was_trained_on(folder):
    values = json.loads((folder / CONFIG).read_text())
    assert values["format_version"] == 1
    assert values["base_model"] == {
        "class": "VisionTransformer",
        "architecture": "vit_tiny_patch16_224",
        "tag": "augreg_in21k_ft_in1k",
    }
    assert values["num_classes"] == 5
    assert RLRRConfig.from_dict(values["rlrr"]) == RLRRConfig()
    assert values["parameters"] == count_parameters(tuned())[0]
    assert values["versions"]["torch"] == torch.__version__
    weight = small_vit().blocks[1].mlp.fc2.weight.detach().double()
    rows, columns = (
        torch.tensor([1.0 if i * 2654435769 % 2**32 >= 2**31 else -1.0 for i in range(count)]).double()
        for count in weight.shape
    )
    mean, signed = values["fingerprint"]["blocks.1.mlp.fc2"]
    assert mean == pytest.approx(float(weight.abs().mean()), rel=1e-5)
    assert signed == pytest.approx(float(rows @ weight @ columns / weight.norm()), rel=1e-4)
    assert len(values["fingerprint"]) == 8
    # versions from before there were names of classes read it
    assert "class_names" not in values
    assert Manifest.read(folder).class_names is None


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        # a mean of |W| would not see another order: of a fused qkv whose parts stand the other way round, of columns
        ("blocks.0.attn.qkv", lambda weight: weight.flip(0)),
        ("blocks.0.mlp.fc1", lambda weight: weight.flip(1)),
        ("blocks.1.mlp.fc2", lambda weight: 1.05 * weight),
    ],
)
def test_other_pretrained_weights_are_refused_naming_the_first_layer_that_differs(folder, layer, change):
    model = small_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight.mul_(1.05)
        model.get_submodule(layer).weight.copy_(change(small_vit().get_submodule(layer).weight))
    before = values_of(model)
    with pytest.raises(ValueError, match=rf"{re.escape(layer)}\.weight differs .*or pass check_base=False"):
        load_adapter(model, folder)
    assert_untouched(model, before)
    load_adapter(model, folder, check_base=False)
    assert torch.equal(model.head.weight, tuned().head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_weights_in_another_dtype_are_taken(folder, dtype):
    model = load_adapter(small_vit().to(dtype), folder)
    assert model.head.weight.dtype is dtype
    assert torch.equal(model.blocks[0].attn.proj.scale_out.float(), tuned().blocks[0].attn.proj.scale_out)


def test_another_architecture_of_the_same_shape_is_refused(folder):
    model = small_vit()
    model.pretrained_cfg = model.pretrained_cfg | {"architecture": "deit_tiny_patch16_224"}
    with pytest.raises(ValueError, match="on architecture vit_tiny_patch16_224, the model's is deit_tiny_patch"):
        load_adapter(model, folder)
    with pytest.raises(ValueError, match="trained on class VisionTransformer, the model's is SwinTransformer"):
        load_adapter(small_swin(), folder)


def test_a_configuration_that_does_not_fit_is_an_error_that_names_the_adapter(folder):
    edit(folder, rlrr=RLRRConfig(target_modules=["stages.*"]).to_dict())
    model = small_vit()
    before = values_of(model)
    with pytest.raises(ValueError, match=r"an adapter does not fit the model: target_modules: 'stages\.\*' matches no"):
        load_adapter(model, folder)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("{}", "expected format_version 1, got None"),
        (" " * 2**22 + "{}", "has more than 4194304 bytes"),
    ],
)
def test_a_configuration_that_is_none_is_refused(folder, text, words):
    (folder / CONFIG).write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*{words}"):
        load_adapter(small_vit(), folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "expected format_version 1, got 2"),
        ({"format_version": True}, "expected format_version 1, got True"),
        ({"base_model": None}, "base_model: expected dict, got None"),
        ({"base_model": {"class": 3}}, "base_model: 'class' has a bad value: 3"),
        ({"num_classes": "5"}, "num_classes: expected int or nothing, got '5'"),
        ({"class_names": "abcde"}, "class_names: expected list or nothing, got 'abcde'"),
        ({"class_names": ["a", "b"]}, "class_names: expected 5, one a class, got 2"),
        ({"class_names": ["a", "b", "c", "d", 5]}, "class_names: expected strings, got 5"),
        ({"parameters": 1.5}, "parameters: expected int, got 1.5"),
        ({"rlrr": {"ranks": 3}}, "unknown field 'ranks'"),
        ({"rlrr": {"rank": 10**9}}, "rank: expected 1 to 128, got 1000000000"),
        ({"rlrr": {"init": "code"}}, "init: expected 'paper', 'identity' or a callable, got 'code'"),
        ({"fingerprint": {"a": [1]}}, "fingerprint: expected two numbers for 'a'"),
        ({"fingerprint": {"a": [10**400, 1]}}, "too large"),
        ({"fingerprint": {"a": [1, 2]}}, "base model: expected a layer a, VisionTransformer has none"),
        ({"fingerprint": {"blocks.0.mlp.fc1": [float("nan"), 0]}}, r"blocks\.0\.mlp\.fc1\.weight differs"),
    ],
)
def test_bad_values_in_the_configuration_are_named(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=words):
        load_adapter(small_vit(), folder)


def test_a_probe_on_convolutions_knows_its_base(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    model[0].requires_grad_(False)
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_bytes())["fingerprint"].keys() == {"0"}
    load_adapter(model, tmp_path / "a")
    nn.init.normal_(model[0].weight)
    with pytest.raises(ValueError, match=r"base model: 0\.weight differs from the one that the adapter was trained on"):
        load_adapter(model, tmp_path / "a")


def test_names_of_classes_are_part_of_the_configuration_and_of_the_card(tmp_path):
    names = ["cat", "a | b", "c\nd", "\udcff", "dog"]  # the fourth: a folder's name that is no UTF-8
    save_adapter(tuned(), tmp_path / "a", class_names=names)
    assert Manifest.read(tmp_path / "a").class_names == tuple(names)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "\nClasses, in the order of the logits: cat, a \\| b, 'c\\\\nd', '\\\\udcff', dog.\n" in card
    save_adapter(tuned(), tmp_path / "a", class_names=names)
    with pytest.raises(FileExistsError, match="another configuration"):
        save_adapter(tuned(), tmp_path / "a", class_names=names[::-1])
    with pytest.raises(ValueError, match="class_names: expected 5, one a class of the model, got 2"):
        save_adapter(tuned(), tmp_path / "b", class_names=["cat", "dog"])
    for wrong in ("abcde", [1, 2, 3, 4, 5]):
        with pytest.raises(TypeError, match="class_names: expected a sequence of strings"):
            save_adapter(tuned(), tmp_path / "b", class_names=wrong)
    assert not (tmp_path / "b").exists()
