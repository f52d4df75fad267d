"""Adapter files: only what trains, whole or not at all, checked before anything is loaded."""

import os
import stat

import pytest
import torch
from safetensors.torch import save_file

from rlrr_kernels import apply_rlrr, load_adapter, save_adapter
from rlrr_kernels.checkpoint import FORMAT, adapter_metadata, write_atomically
from tests.test_adapt import X, small_vit


def trained_model(seed=1):
    model = apply_rlrr(small_vit())
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_a_round_trip_brings_back_the_function(tmp_path):
    model = trained_model()
    save_adapter(model, tmp_path / "a.safetensors", {"base_model": "small"})
    other = apply_rlrr(small_vit())
    assert not torch.equal(other(X), model(X))
    load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(X), model(X))
    assert adapter_metadata(tmp_path / "a.safetensors") == {"base_model": "small", "format": FORMAT}


def test_only_what_trains_is_in_the_file(tmp_path):
    model = trained_model()
    save_adapter(model, tmp_path / "a.safetensors")
    size = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size < (tmp_path / "a.safetensors").stat().st_size < size + 8192


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_adapter(trained_model(), path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained_model(2), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_files_get_the_usual_permissions(tmp_path):
    write_atomically(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_names_and_shapes_are_checked_before_anything_is_copied(tmp_path):
    state = {n: p.detach().clone() for n, p in trained_model().named_parameters() if p.requires_grad}
    state["head.weight"] = torch.zeros(7, 48)
    del state["blocks.1.mlp.fc2.shift"]
    state["blocks.9.attn.qkv.shift"] = torch.zeros(3)
    save_file(state, tmp_path / "a.safetensors", metadata={"format": FORMAT})
    model = apply_rlrr(small_vit())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"does not fit the model") as caught:
        load_adapter(model, tmp_path / "a.safetensors")
    for words in (
        "missing blocks.1.mlp.fc2.shift",
        "unexpected blocks.9.attn.qkv.shift",
        "head.weight of shape [7, 48], expected [5, 48]",
    ):
        assert words in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_other_files_are_refused(tmp_path):
    model = apply_rlrr(small_vit())
    with pytest.raises(FileNotFoundError, match=r"none.safetensors does not exist"):
        load_adapter(model, tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("not tensors at all")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_adapter(model, tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"expected a file of format .*, got None"):
        load_adapter(model, tmp_path / "b.safetensors")


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing in it needs gradients"):
        save_adapter(small_vit().requires_grad_(False), tmp_path / "a.safetensors")
    assert os.listdir(tmp_path) == []
