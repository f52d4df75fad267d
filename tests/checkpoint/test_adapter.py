"""Adapter folders: only what trains, whole or not at all, checked before anything is loaded."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rlrr_kernels import FusedRLRRLinear, apply_rlrr, count_parameters, disable_adapter, merge
from rlrr_kernels.checkpoint import CARD, CONFIG, WEIGHTS, adapter_metadata, load_adapter, save_adapter
from rlrr_kernels.checkpoint.manifest import Manifest
from tests.small_models import X, small_swin, small_vit, stir


def tuned(model=None, **options):
    return stir(apply_rlrr(small_vit() if model is None else model, **options))


def values_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before):
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def tensors_of(folder):
    """Copies: what safetensors loads is a view of the file, which some tests write over."""
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}


def edit(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


@pytest.fixture
def folder(tmp_path):
    save_adapter(tuned(), tmp_path / "an adapter", {"dataset": "cifar"})
    return tmp_path / "an adapter"


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_affine": False, "groups": {}},
        {"rank": 3, "scaling": 0.5},
        {"target_modules": ["*.fc1"], "init": "identity", "train_head": False},
    ],
)
def test_a_round_trip_brings_back_the_function(tmp_path, options, prepared):
    model = tuned(**options)
    save_adapter(model, tmp_path / "a")
    other = small_vit()
    if prepared:
        apply_rlrr(other, **options)
    assert not torch.equal(other(X), model(X))
    assert load_adapter(other, tmp_path / "a") is other
    assert torch.equal(other(X), model(X))
    trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, other)]
    assert trained[0] == trained[1]
    assert other.rlrr_config == model.rlrr_config


def test_a_swin_and_weights_frozen_in_bfloat16_make_the_round_trip(tmp_path):
    model = tuned(small_swin(), frozen_dtype=torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    other = load_adapter(small_swin(), tmp_path / "a")
    assert other.layers[1].downsample.reduction.weight.dtype is torch.bfloat16
    assert torch.equal(other(X), model(X))


def test_only_what_trains_is_in_the_file(folder):
    model = tuned()
    tensors = tensors_of(folder)
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert tensors.keys() == expected.keys()
    assert "head.bias" in tensors
    assert all(torch.equal(tensors[name], parameter) for name, parameter in expected.items())
    assert sorted(os.listdir(folder)) == sorted([CARD, CONFIG, WEIGHTS])


def test_metadata_is_kept_in_the_file_s_header_and_has_to_be_strings(tmp_path, folder):
    assert adapter_metadata(folder) == {"dataset": "cifar"}
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert file.metadata() == {"dataset": "cifar", "format": "pt"}
    with pytest.raises(TypeError, match=r"metadata: expected strings only, got {'accuracy': 0\.5}"):
        save_adapter(tuned(), tmp_path / "a", {"accuracy": 0.5})
    with pytest.raises(ValueError, match="'format' is reserved"):
        save_adapter(tuned(), tmp_path / "a", {"format": "x"})
    assert not (tmp_path / "a").exists()


def test_an_adapter_frozen_for_inference_is_saved_whole(tmp_path, folder):
    save_adapter(tuned().requires_grad_(False), tmp_path / "b")
    assert tensors_of(tmp_path / "b").keys() == tensors_of(folder).keys()


def test_a_merged_model_is_saved_with_the_fingerprint_of_its_frozen_weights(tmp_path, folder):
    model = merge(tuned())
    save_adapter(model, tmp_path / "b")
    assert Manifest.read(tmp_path / "b").fingerprint == Manifest.read(folder).fingerprint
    with pytest.raises(ValueError, match="it is merged; unmerge before loading"):
        load_adapter(model, folder)
    with pytest.raises(RuntimeError, match="was not kept"):
        save_adapter(merge(tuned(), keep=False), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_switched_off_adapter_is_neither_saved_nor_loaded(tmp_path, folder):
    model = tuned()
    with disable_adapter(model):
        with pytest.raises(ValueError, match=r"patch_embed\.norm is switched off"):
            save_adapter(model, tmp_path / "b")
        with pytest.raises(ValueError, match="is switched off"):
            load_adapter(model, folder)


def test_compiled_and_data_parallel_models_are_looked_into(tmp_path, folder):
    wrapped = torch.compile(nn.DataParallel(tuned()))
    save_adapter(wrapped, tmp_path / "b")
    assert tensors_of(tmp_path / "b").keys() == tensors_of(folder).keys()
    other = nn.DataParallel(small_vit())
    assert load_adapter(other, folder) is other
    assert torch.equal(other.module(X), tuned()(X))
    parts = tuned()
    parts.blocks[1] = torch.compile(parts.blocks[1])
    save_adapter(parts, tmp_path / "c")
    assert torch.equal(load_adapter(small_vit(), tmp_path / "c")(X), tuned()(X))


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing in it needs gradients"):
        save_adapter(small_vit().requires_grad_(False), tmp_path / "a")
    with pytest.raises(ValueError, match=r"patch_embed\.norm\.ssf_scale is on the meta device"):
        save_adapter(tuned().to("meta"), tmp_path / "a")
    assert os.listdir(tmp_path) == []


# models that were not prepared by apply_rlrr


def test_a_linear_probe_goes_onto_a_plain_model_and_onto_one_with_the_same_part_trained(tmp_path):
    model = small_vit().requires_grad_(False)
    model.head.requires_grad_(True)
    stir(model)
    save_adapter(model, tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["rlrr"] is None
    assert tensors_of(tmp_path / "a").keys() == {"head.weight", "head.bias"}
    probe = small_vit().requires_grad_(False)
    probe.head.requires_grad_(True)
    for other in (small_vit(), probe):
        load_adapter(other, tmp_path / "a")
        assert torch.equal(other(X), model(X))
        assert not any(isinstance(module, FusedRLRRLinear) for module in other.modules())
    probe.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"does not fit the model: missing norm\.bias; missing norm\.weight$"):
        load_adapter(probe, tmp_path / "a")
    changed = small_vit()
    with torch.no_grad():
        changed.blocks[0].mlp.fc2.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc2\.weight differs"):
        load_adapter(changed, tmp_path / "a")


def test_full_fine_tuning_makes_the_round_trip(tmp_path):
    model = stir(small_vit())
    save_adapter(model, tmp_path / "a")
    other = load_adapter(small_vit(), tmp_path / "a")
    assert torch.equal(other(X), model(X))
    state = tensors_of(tmp_path / "a")
    del state["blocks.0.norm1.weight"]
    save_file(state, tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors: expected \d+ numbers as adapter_config\.json says"):
        load_adapter(other, tmp_path / "a")


# what does not fit


def test_names_shapes_and_dtypes_are_checked_before_anything_is_changed(folder):
    state = tensors_of(folder)
    state["head.weight"] = torch.zeros(7, 48)
    del state["blocks.1.mlp.fc2.shift"]
    state["blocks.9.attn.qkv.shift"] = torch.zeros(3)
    state["norm.ssf_scale"] = torch.ones(48, dtype=torch.int64)
    save_file(state, folder / WEIGHTS)
    edit(folder, parameters=sum(tensor.numel() for tensor in state.values()))
    for model in (small_vit(), tuned()):
        before, trained = values_of(model), count_parameters(model)
        with pytest.raises(ValueError, match=r"adapter .*an adapter does not fit the model: ") as caught:
            load_adapter(model, folder)
        for words in (
            "missing blocks.1.mlp.fc2.shift",
            "unexpected blocks.9.attn.qkv.shift",
            "head.weight of shape [7, 48], expected [5, 48]",
            "norm.ssf_scale of torch.int64, expected floating point numbers",
        ):
            assert words in str(caught.value)
        assert_untouched(model, before)
        assert count_parameters(model) == trained
        assert model.training is False


def test_a_long_list_of_what_does_not_fit_is_cut(folder):
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_adapter(tuned(small_vit(depth=3)), folder)
    assert str(caught.value).count("missing") == 8
    assert str(caught.value).endswith("; and 8 more")


def test_a_model_prepared_in_another_way_is_refused(folder):
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.scale_in of shape \[3, 1, 48\], expected \[1, 48\]"):
        load_adapter(apply_rlrr(small_vit(), groups={}), folder)
    with pytest.raises(ValueError, match=r"unexpected blocks\.0\.norm1\.ssf_scale"):
        load_adapter(apply_rlrr(small_vit(), norm_affine=False), folder)


@pytest.mark.parametrize(
    ("given", "own"), [({"rank": 3}, {}), ({}, {"rank": 3}), ({"rank": 3, "scaling": 0.5}, {"rank": 3})], ids=str
)
def test_another_rank_or_scaling_is_one_error_that_names_both(tmp_path, given, own):
    save_adapter(tuned(**given), tmp_path / "a")
    model = tuned(**own)
    before = values_of(model)
    described = [f"rank {of.get('rank', 1)} and scaling {of.get('scaling', 1):g}" for of in (given, own)]
    words = (
        rf"does not fit the model: it has {described[0]}, and the model's blocks\.0\.attn\.qkv has {described[1]}; prep"
    )
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path / "a")
    assert_untouched(model, before)


def test_an_adapter_from_before_ranks_has_rank_1(folder):
    values = json.loads((folder / CONFIG).read_text())
    assert (values["rlrr"].pop("rank"), values["rlrr"].pop("scaling")) == (1, 1.0)
    edit(folder, rlrr=values["rlrr"])
    assert torch.equal(load_adapter(small_vit(), folder)(X), tuned()(X))
    assert torch.equal(load_adapter(apply_rlrr(small_vit()), folder)(X), tuned()(X))


# meta device, sharded parameters


def test_parameters_on_the_meta_device_are_made_from_the_file_in_the_model_s_dtype(folder):
    with torch.device("meta"):
        model, halves = small_vit(), small_vit().bfloat16()
    load_adapter(halves, folder, check_base=False)
    assert torch.equal(halves.head.weight, tuned().head.weight.bfloat16())
    assert torch.equal(halves.blocks[0].mlp.fc1.scale_out, tuned().blocks[0].mlp.fc1.scale_out)
    load_adapter(model, folder)
    assert model.blocks[0].mlp.fc1.weight.is_meta
    assert model.blocks[0].mlp.fc1.scale_in.requires_grad
    assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cpu"}
    model.load_state_dict({n: t for n, t in small_vit().state_dict().items() if "head" not in n}, False, assign=True)
    assert torch.equal(model(X), tuned()(X))


def test_a_tied_parameter_on_the_meta_device_stays_tied(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

    model = Twice()
    save_adapter(model, tmp_path / "a")
    with torch.device("meta"):
        other = Twice()
    load_adapter(other, tmp_path / "a")
    assert other.a.weight is other.b.weight
    assert torch.equal(other.b.weight, model.a.weight)


def test_sharded_parameters_are_filled_and_gathered_again(tmp_path, folder):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = fully_shard(apply_rlrr(small_vit()), mesh=mesh)
        model(X)  # which leaves whole parameters in the place of shards
        load_adapter(model, folder)
        fits = torch.equal(model(X), tuned()(X))
        save_adapter(model, tmp_path / "b", {"dataset": "cifar"})
        del model, mesh
    finally:
        distributed.destroy_process_group()
    assert fits
    for name in (CONFIG, CARD):
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    expected, got = tensors_of(folder), tensors_of(tmp_path / "b")
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


# damaged and hostile folders


def test_other_paths_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"adapter folder .*none does not exist"):
        load_adapter(small_vit(), tmp_path / "none")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file is a file; an adapter is a folder"):
        load_adapter(small_vit(), tmp_path / "file")
    for call in (lambda: load_adapter(small_vit(), tmp_path), lambda: adapter_metadata(tmp_path)):
        with pytest.raises(ValueError, match=r"is not an adapter folder: it has no adapter_config\.json"):
            call()


# writing into what exists


def test_a_later_epoch_replaces_tensors_and_card_and_keeps_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    config = (folder / CONFIG).stat().st_ino
    model = tuned(init="identity")
    save_adapter(model, folder, {"epoch": "2"})
    assert adapter_metadata(folder) == {"epoch": "2"}
    assert "| epoch | 2 |" in (folder / CARD).read_text()
    assert (folder / CONFIG).stat().st_ino == config
    assert (folder / "notes.txt").read_text() == "mine"
    assert torch.equal(load_adapter(small_vit(), folder)(X), model(X))


def test_another_configuration_is_not_written_over_unless_asked(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = tuned(norm_affine=False)
    with pytest.raises(FileExistsError, match="holds an adapter of another configuration; pass overwrite=True"):
        save_adapter(model, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes\.txt' beside an adapter of another config"):
        save_adapter(model, folder, overwrite=True)
    (folder / "notes.txt").unlink()
    other = small_vit()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.1)
    with pytest.raises(FileExistsError, match="another configuration"):
        save_adapter(tuned(other), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / f".{WEIGHTS}.0123456789ab.partial").write_text("left by a crash")
    save_adapter(model, folder, overwrite=True)
    assert torch.equal(load_adapter(small_vit(), folder)(X), model(X))
    assert os.listdir(folder.parent) == ["an adapter"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_is_no_adapter_is_never_touched(tmp_path, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("thesis")
    (tmp_path / "file").write_text("thesis")
    with pytest.raises(FileExistsError, match=r"is no adapter folder: it holds 'README\.md'"):
        save_adapter(tuned(), tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(FileExistsError, match="file is a file"):
        save_adapter(tuned(), tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "mine" / "README.md").read_text() == "thesis"
    assert (tmp_path / "file").read_text() == "thesis"


def test_an_unreadable_configuration_is_replaced_only_if_asked(folder):
    (folder / CONFIG).write_text("{")
    with pytest.raises(FileExistsError, match="another configuration"):
        save_adapter(tuned(), folder)
    save_adapter(tuned(), folder, overwrite=True)
    assert torch.equal(load_adapter(small_vit(), folder)(X), tuned()(X))


def test_empty_folders_links_to_folders_and_new_parents_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    for name in ("link", "new/parent/a"):
        save_adapter(tuned(), tmp_path / name)
        assert torch.equal(load_adapter(small_vit(), tmp_path / name)(X), tuned()(X))
    save_adapter(tuned(norm_affine=False), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "new"]
