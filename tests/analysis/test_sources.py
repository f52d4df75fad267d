"""Each kind of tuned model, read back as exactly the weights that it computes with."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rlrr_kernels import apply_rlrr, merge, merge_and_unload, save_adapter
from rlrr_kernels.analysis import (
    full_checkpoint,
    linear_weights,
    lora_adapter,
    rlrr_adapter,
    rlrr_of_model,
    ssf_checkpoint,
)
from rlrr_kernels.analysis.updates import LowRank, OutputScaled, Replaced, Rescaled
from tests.small_models import small_swin, small_vit, stir

LINEARS = {f"blocks.{i}.{leaf}" for i in range(2) for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


def base_of(model):
    return {name: weight for name, weight in linear_weights(model).items() if not name.startswith("head")}


@pytest.fixture
def base():
    return base_of(small_vit())


def lora_folder(path, tensors, **config):
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True}
    (path / "adapter_config.json").write_text(json.dumps(plain | config))
    return path


def lora_tensors(name="blocks.0.mlp.fc1", n=192, k=48, r=4):
    return {
        f"base_model.model.{name}.lora_A.weight": torch.randn(r, k),
        f"base_model.model.{name}.lora_B.weight": torch.randn(n, r),
    }


@pytest.mark.parametrize("options", [{}, {"rank": 3, "scaling": 0.5}], ids=str)
@pytest.mark.parametrize("make", [small_vit, small_swin])
def test_an_rlrr_adapter_amounts_to_the_merged_model(tmp_path, make, options):
    """q, k and v have a v each in the ViT, and share one in Swin."""
    model = stir(apply_rlrr(make(), **options))
    save_adapter(model, tmp_path / "run" / "adapter")
    plain = base_of(make())
    tuned = rlrr_adapter(tmp_path / "run", plain)
    assert tuned.updates.keys() == plain.keys()
    assert tuned.method == "RLRR"
    assert {"head.weight" if make is small_vit else "head.fc.weight", "norm.ssf_scale"} <= set(tuned.skipped)
    of_model, from_model = rlrr_of_model(model)
    assert of_model.keys() == plain.keys()
    merged = base_of(merge_and_unload(model))
    for name, weight in plain.items():
        assert torch.allclose(tuned.updates[name](weight).float(), merged[name], rtol=1e-6, atol=1e-8)
        assert torch.equal(from_model.updates[name](of_model[name]), tuned.updates[name](weight))


def test_the_folder_itself_will_do_and_rounded_weights_too(tmp_path, base):
    save_adapter(apply_rlrr(small_vit()), tmp_path / "adapter")
    assert rlrr_adapter(tmp_path / "adapter", base).updates.keys() == LINEARS
    assert rlrr_adapter(tmp_path / "adapter", {n: w.bfloat16() for n, w in base.items()}).updates


def test_a_model_in_memory_must_be_adapted():
    with pytest.raises(ValueError, match="holds no FusedRLRRLinear"):
        rlrr_of_model(small_vit())


def test_a_merged_model_still_shows_its_frozen_weights(base):
    model = stir(apply_rlrr(small_vit()))
    merge(model)
    frozen, tuned = rlrr_of_model(model)
    assert all(torch.equal(frozen[name], weight) for name, weight in base.items())
    fc1 = model.blocks[0].mlp.fc1
    assert torch.allclose(tuned.updates["blocks.0.mlp.fc1"](frozen["blocks.0.mlp.fc1"]).float(), fc1.weight)


def test_rescaling_by_groups_is_the_formula():
    u, v, weight = torch.randn(6, 2), torch.randn(3, 2, 4), torch.randn(6, 4)
    updated = Rescaled(u, v)(weight)
    for n in range(6):
        for k in range(4):
            s = 1 + sum(float(u[n, r]) * float(v[n // 2, r, k]) for r in range(2))
            assert float(updated[n, k]) == pytest.approx(float(weight[n, k]) * s)
    rows = Rescaled(u, v).scales(slice(2, 4))
    assert torch.equal(rows[0], u[2:4])
    assert torch.equal(rows[1], v[1])
    assert Rescaled(u, v).scales(slice(0, 6)) is None  # no one v for all rows
    assert torch.equal(Rescaled(u, v[0]).scales(slice(0, 6))[1], v[0])


def test_the_scales_of_output_scaling_are_a_rescaling():
    weight, scale = torch.randn(6, 4), torch.randn(6)
    u, v = OutputScaled(scale).scales(slice(2, 5))
    assert torch.allclose(weight[2:5] * (1 + u @ v), OutputScaled(scale)(weight)[2:5])
    assert torch.allclose(OutputScaled(scale)(weight).float(), scale.diag() @ weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "alpha_pattern": {"mlp.fc1": 3}, "rank_pattern": {"qkv": 2}}]
)
def test_a_lora_adapter_amounts_to_what_peft_merges(tmp_path, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["qkv", "fc1", "patch_embed.proj"], modules_to_save=["head"], **options
    )
    model = peft.get_peft_model(small_vit(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    plain = base_of(small_vit())
    tuned = lora_adapter(tmp_path, plain)
    assert tuned.updates.keys() == {name for name in LINEARS if name.endswith(("qkv", "fc1"))}
    assert "patch_embed.proj" in tuned.skipped
    assert any("head" in name for name in tuned.skipped)
    merged = dict(model.merge_and_unload().named_modules())
    for name, update in tuned.updates.items():
        assert torch.allclose(update(plain[name]).float(), merged[name].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 2),
        ({"use_rslora": True}, 4),
        ({"alpha_pattern": {"mlp.fc1": 12}}, 3),
        ({"alpha_pattern": {r"blocks\.\d\.mlp\.fc1": 12}}, 3),
        ({"alpha_pattern": {"fc1": 12, "mlp.fc1": 20}}, 3),  # the first that matches
        ({"alpha_pattern": {"fc": 12, "c1": 12, "mlp.fc2": 12}}, 2),
    ],
)
def test_loras_scaling(tmp_path, base, config, scaling):
    update = lora_adapter(lora_folder(tmp_path / "lora", lora_tensors(), **config), base).updates["blocks.0.mlp.fc1"]
    assert isinstance(update, LowRank)
    assert update.scaling == scaling
    weight = base["blocks.0.mlp.fc1"].double()
    assert torch.allclose(update(weight), weight + scaling * update.b.double() @ update.a.double())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "expected a LoRA adapter of PEFT, got peft_type 'LOHA'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the base weights"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a number, got 'x'"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, base, config, words):
    with pytest.raises(ValueError, match=words):
        lora_adapter(lora_folder(tmp_path / "lora", lora_tensors(), **config), base)


def test_lora_tensors_that_do_not_belong_together_are_refused(tmp_path, base):
    tensors = lora_tensors()
    (a, _), (b, matrix) = tensors.items()
    with pytest.raises(ValueError, match=r"fc1.lora_B.weight is missing"):
        lora_adapter(lora_folder(tmp_path / "1", {a: tensors[a]}), base)
    with pytest.raises(ValueError, match=r"fc1: expected lora_A \[r, K\] and lora_B \[N, r\]"):
        lora_adapter(lora_folder(tmp_path / "2", {a: tensors[a], b: matrix[:, :3].contiguous()}), base)
    extra = {b.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(192)}
    with pytest.raises(ValueError, match="lora_magnitude_vector belongs to no plain LoRA"):
        lora_adapter(lora_folder(tmp_path / "3", tensors | extra), base)
    with pytest.raises(
        ValueError, match=r"nothing that was tuned, such as layers.9, is a linear of the base.*blocks.0"
    ):
        lora_adapter(lora_folder(tmp_path / "4", lora_tensors("layers.9")), base)


def test_an_ssf_checkpoint_scales_outputs_by_either_naming(tmp_path, base):
    scales = {name: torch.randn(len(base[name])) for name in ("blocks.0.mlp.fc1", *(n for n in base if ".1." in n))}
    state = {
        "blocks.0.mlp.fc1.ssf_scale": scales["blocks.0.mlp.fc1"],
        "blocks.1.attn.ssf_scale_1": scales["blocks.1.attn.qkv"],
        "blocks.1.attn.ssf_scale_2": scales["blocks.1.attn.proj"],
        "blocks.1.mlp.ssf_scale_1": scales["blocks.1.mlp.fc1"],
        "blocks.1.mlp.ssf_scale_2": scales["blocks.1.mlp.fc2"],
        "blocks.1.ssf_scale_1": torch.randn(48),
        "blocks.1.norm1.ssf_scale": torch.randn(48),
        "blocks.0.mlp.fc1.weight": base["blocks.0.mlp.fc1"].bfloat16(),
        "head.weight": torch.randn(5, 48),
    }
    torch.save({"state_dict": state}, tmp_path / "ssf.pth")
    tuned = ssf_checkpoint(tmp_path / "ssf.pth", base)
    assert len(scales) == 5
    assert tuned.updates.keys() == scales.keys()
    assert set(tuned.skipped) == {"blocks.1.ssf_scale_1", "blocks.1.norm1"}
    for name, scale in scales.items():
        assert torch.allclose(tuned.updates[name](base[name]), (scale[:, None] * base[name]).double())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"blocks.0.mlp.fc1.ssf_scale": torch.ones(7)}, "has 7 values, and blocks.0.mlp.fc1 has 192 outputs"),
        ({"blocks.0.mlp.fc1.weight": torch.randn(192, 48)}, "blocks.0.mlp.fc1.weight is not the base's"),
    ],
)
def test_an_ssf_checkpoint_of_another_model_is_refused(tmp_path, base, change, words):
    save_file({"blocks.0.mlp.fc1.ssf_scale": torch.ones(192)} | change, tmp_path / "ssf.safetensors")
    with pytest.raises(ValueError, match=words):
        ssf_checkpoint(tmp_path / "ssf.safetensors", base)


def test_a_full_checkpoint_replaces_weights(tmp_path, base):
    tuned_model = small_vit()
    torch.nn.init.normal_(tuned_model.blocks[1].mlp.fc2.weight)
    save_file(tuned_model.state_dict(), tmp_path / "full.safetensors")
    tuned = full_checkpoint(tmp_path / "full.safetensors", base)
    assert tuned.updates.keys() == LINEARS
    assert isinstance(tuned.updates["blocks.1.mlp.fc2"], Replaced)
    assert torch.equal(
        tuned.updates["blocks.1.mlp.fc2"](base["blocks.1.mlp.fc2"]).float(), tuned_model.blocks[1].mlp.fc2.weight
    )
    save_adapter(tuned_model, tmp_path / "run" / "adapter")  # a run of --method full
    again = full_checkpoint(tmp_path / "run", base)
    assert torch.equal(again.updates["blocks.1.mlp.fc2"].weight, tuned.updates["blocks.1.mlp.fc2"].weight)


@pytest.mark.parametrize(
    ("u", "v", "words"),
    [
        (torch.ones(6, 2), torch.ones(1, 4), r"got \[6, 2\] and \[1, 4\]"),
        (torch.ones(6), torch.ones(4), r"got \[6\] and \[4\]"),
        (torch.ones(6, 1), torch.ones(4, 1, 4), "4 groups do not divide 6 rows"),
        (torch.ones(6, 1), torch.ones(0, 1, 4), r"scale_in: expected one group or more, got \[0, 1, 4\]"),
    ],
)
def test_scales_of_wrong_shapes_are_refused(u, v, words):
    with pytest.raises(ValueError, match=words):
        Rescaled(u, v)
