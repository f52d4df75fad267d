"""The model that others were tuned from, however it is given."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import rlrr_kernels.finetune.embedded  # noqa: F401  registers the model
from rlrr_kernels.analysis import base_weights, full_checkpoint
from tests.checkpoint.test_npz import google_arrays
from tests.small_models import small_swin, stir


def test_base_weights_of_a_run_a_model_and_a_file_are_the_same(tmp_path):
    name = "vit_embedded_patch7_28"
    of_model = base_weights(name)
    assert len(of_model) == 20
    assert "head" not in of_model
    model = timm.create_model(name, pretrained=True)
    assert torch.equal(of_model["blocks.4.mlp.fc2"], model.blocks[4].mlp.fc2.weight)
    settings = {"model": name, "pretrained": True, "checkpoint": None}
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": settings}))
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    for other in (base_weights(str(tmp_path)), base_weights(str(file)), base_weights(name, file)):
        assert all(torch.equal(other[layer], weight) for layer, weight in of_model.items())


def test_bases_that_cannot_be_had_say_why(tmp_path):
    with pytest.raises(ValueError, match="'vit_nonsense' is no file or folder, and not to be had from timm"):
        base_weights("vit_nonsense")
    with pytest.raises(FileNotFoundError, match=r"none.pth does not exist"):
        base_weights("vit_embedded_patch7_28", "none.pth")
    with pytest.raises(FileNotFoundError, match=r"metrics.json does not exist"):
        base_weights(str(tmp_path))
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        base_weights(str(tmp_path))
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        base_weights(str(tmp_path))
    (tmp_path / "metrics.json").write_text('{"settings": {"model": "vit_embedded_patch7_28", "pretrained": false}}')
    with pytest.raises(ValueError, match="the run started from random weights"):
        base_weights(str(tmp_path))
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no matrix named <layer>.weight"):
        base_weights(str(tmp_path / "x.safetensors"))


def test_a_run_on_a_published_npz_has_its_weights(tmp_path):
    name = "vit_embedded_patch7_28"
    other = stir(timm.create_model(name, num_classes=10))
    np.savez(tmp_path / "vit.npz", **google_arrays(other))
    settings = {"model": name, "pretrained": True, "checkpoint": str(tmp_path / "vit.npz")}
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": settings}))
    of_run, of_model = base_weights(str(tmp_path)), base_weights(name, tmp_path / "vit.npz")
    assert len(of_run) == 20
    assert of_run.keys() == of_model.keys()
    for layer, weight in of_run.items():
        assert torch.equal(weight, other.get_submodule(layer).weight)
        assert torch.equal(weight, of_model[layer])
    with pytest.raises(ValueError, match=r"vit.npz: .*expected a timm VisionTransformer, got SwinTransformer"):
        base_weights("swin_tiny_patch4_window7_224", tmp_path / "vit.npz")
    with pytest.raises(ValueError, match=r"vit.npz: expected the name of its timm model, and the file as --checkpoint"):
        base_weights(str(tmp_path / "vit.npz"))


def test_a_file_s_head_is_none_of_its_layers_whatever_its_size(tmp_path):
    name = "vit_embedded_patch7_28"
    base, file = timm.create_model(name, num_classes=10), tmp_path / "base.safetensors"
    save_file(base.state_dict(), file)
    found = base_weights(str(file))
    assert found.keys() == base_weights(name).keys()
    for classes in (10, 4):
        tuned = tmp_path / f"{classes}.safetensors"
        save_file(stir(timm.create_model(name, num_classes=classes)).state_dict(), tuned)
        read = full_checkpoint(tuned, found)
        assert read.updates.keys() == found.keys()
        assert "head.weight" in read.skipped


@pytest.mark.parametrize("classifier", ["head", "head.fc", "head_dist", "fc", "classifier"])
def test_classifiers_are_known_by_timm_s_names(tmp_path, classifier):
    parts = {"blocks.0.mlp.fc": torch.ones(3, 2), "blocks.0.head": torch.ones(2, 3), classifier: torch.ones(5, 2)}
    save_file({f"{layer}.weight": weight for layer, weight in parts.items()}, tmp_path / "x.safetensors")
    assert base_weights(str(tmp_path / "x.safetensors")).keys() == {"blocks.0.mlp.fc", "blocks.0.head"}


def test_a_file_that_names_its_model_is_without_that_model_s_head(tmp_path):
    """As ``rlrr-finetune merge`` names it; ConvFormer's classifier is called ``head.fc.fc2``."""
    swin = small_swin().state_dict()
    state = {name: tensor.contiguous() for name, tensor in swin.items()} | {"head.fc.fc2.weight": torch.ones(5, 48)}
    save_file(state, tmp_path / "swin.safetensors", {"model": "swin_tiny_patch4_window7_224"})
    found = base_weights(str(tmp_path / "swin.safetensors"))
    plain = {name for name, module in small_swin().named_modules() if isinstance(module, nn.Linear)}
    assert found.keys() == plain - {"head.fc"} | {"head.fc.fc2"}
    save_file(state, tmp_path / "conv.safetensors", {"model": "convformer_s18.sail_in1k"})
    assert "head.fc.fc2" not in base_weights(str(tmp_path / "conv.safetensors"))
