"""``rlrr-finetune merge``: the file is timm's model, and equivalent to the tuned one."""

from unittest import mock

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rlrr_kernels import apply_rlrr, load_adapter, save_adapter
from rlrr_kernels.finetune.settings import Settings
from tests.finetune.commands.conftest import QUICK, status


def plain(**options):
    return timm.create_model(Settings.model, pretrained=False, num_classes=10, **options).eval()


def tuned_model(run):
    model = timm.create_model(Settings.model, pretrained=True, num_classes=10)
    return load_adapter(model, run / "adapter").eval()


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 0.1), ("fp16", 0.01)])
def test_the_file_loads_into_timm_and_gives_the_tuned_logits(tuned, tmp_path, capsys, dtype, bound):
    out = tmp_path / "merged weights.safetensors"
    assert status("merge", tuned, "--out", out, "--dtype", dtype) == 0
    state = load_file(out)
    assert {tensor.dtype for tensor in state.values()} == {
        {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    }
    model = plain()
    model.load_state_dict(state, strict=True)
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        expected, got = tuned_model(tuned)(images), model(images)
    assert (got - expected).abs().max() <= bound * expected.abs().max()
    # the base weights differ clearly
    assert (state["blocks.0.attn.qkv.weight"].float() - tuned_model(tuned).blocks[0].attn.qkv.weight).abs().max() > 1e-3
    said = capsys.readouterr().out
    assert f"timm.create_model('{Settings.model}', num_classes=10), strict=True" in said
    assert "the same class on 4 of 4" in said
    assert ("rounding undoes the update of" in said) == (dtype != "fp32")


def test_the_file_says_what_it_is(tuned, tmp_path):
    assert status("merge", tuned, "--out", tmp_path / "m.safetensors") == 0
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "model": Settings.model, "num_classes": "10", "dtype": "fp32"}


def test_frozen_weights_in_bf16_are_merged_in_float32(data, tmp_path):
    """Rounding W' to bf16 and widening it again would lose most of its bits."""
    base = timm.create_model(Settings.model, pretrained=True, num_classes=10)
    apply_rlrr(base, frozen_dtype=torch.bfloat16)
    save_adapter(base, tmp_path / "half")
    assert status("merge", tmp_path / "half", "--out", tmp_path / "m.safetensors") == 0
    layer = base.blocks[1].mlp.fc1
    expected = layer.weight.double() * (1 + layer.scale_out.double() * layer.scale_in.double())
    got = load_file(tmp_path / "m.safetensors")["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(got.double(), expected.detach(), rtol=3e-7, atol=0)


def test_a_share_that_rounding_loses_is_counted_right(tmp_path, capsys):
    """Updates of 0.01 vanish in bf16 for about a third of the weights."""
    model = timm.create_model(Settings.model, pretrained=True, num_classes=10)
    apply_rlrr(model, target_modules=["blocks.0.mlp.fc1"])
    layer = model.blocks[0].mlp.fc1
    with torch.no_grad():
        layer.scale_out.fill_(0.1)
        layer.scale_in.copy_(torch.randn(layer.scale_in.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    save_adapter(model, tmp_path / "a")
    assert status("merge", tmp_path / "a", "--out", tmp_path / "m.safetensors", "--dtype", "bf16") == 0
    merged = layer.weight * (1 + layer.scale_out * layer.scale_in)
    share = (merged.bfloat16() == layer.weight.bfloat16()).float().mean().item()
    assert 0.2 < share < 0.5
    assert f"undoes the update of {share:.1%} of the weights" in capsys.readouterr().out


def test_a_layer_that_had_no_bias_is_said_to_have_one(tmp_path, capsys):
    from rlrr_kernels.finetune import saved_run

    model = plain(qkv_bias=False)
    apply_rlrr(model)
    save_adapter(model, tmp_path / "a")
    state = {name: p.detach() for name, p in model.state_dict().items()}

    def build(settings, classes):
        made = plain(qkv_bias=False)
        made.load_state_dict({name: state[name] for name in made.state_dict()})
        return made

    with mock.patch.object(saved_run, "build_model", build):
        assert status("merge", tmp_path / "a", "--out", tmp_path / "m.safetensors") == 0
    said = capsys.readouterr().out
    assert "has no blocks.0.attn.qkv.bias, one of 5 biases of layers that had none: it refuses the file, or" in said
    assert "the same class on 4 of 4" in said


def test_safe_refuses_what_is_not_finite_and_writes_nothing(data, tmp_path, capsys):
    model = apply_rlrr(timm.create_model(Settings.model, pretrained=True, num_classes=10))
    with torch.no_grad():
        model.blocks[2].mlp.fc2.scale_out[3] = float("inf")
    save_adapter(model, tmp_path / "a")
    assert status("merge", tmp_path / "a", "--out", tmp_path / "m.safetensors", "--safe") == 2
    assert "blocks.2.mlp.fc2" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_values_beyond_the_range_of_fp16_are_refused(data, tmp_path, capsys):
    model = apply_rlrr(timm.create_model(Settings.model, pretrained=True, num_classes=10))
    with torch.no_grad():
        model.head.bias[0] = 1e6
    save_adapter(model, tmp_path / "a")
    assert status("merge", tmp_path / "a", "--out", tmp_path / "m.safetensors", "--dtype", "fp16") == 1
    assert "dtype: head.bias has values beyond the range of torch.float16" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def test_where_to_write_is_checked_first(tuned, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    out.write_text("mine")
    assert status("merge", tuned, "--out", out) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert status("merge", tuned, "--out", tmp_path / "m.pth") == 2
    assert "expected a name that ends in .safetensors" in capsys.readouterr().err
    assert status("merge", tuned, "--out", tmp_path / "no" / "m.safetensors") == 2
    assert "does not exist" in capsys.readouterr().err
    assert status("merge", tuned, "--out", out, "--overwrite") == 0
    assert len(load_file(out)) == 68


def test_methods_to_compare_with_are_not_merged(data, tmp_path, capsys):
    assert status("--data", data, "--method", "ssf", "--out", tmp_path / "run", *QUICK) == 0
    assert status("merge", tmp_path / "run", "--out", tmp_path / "m.safetensors") == 2
    assert "method: expected a run of rlrr, linear or full to merge, got ssf" in capsys.readouterr().err


def test_a_linear_probe_has_nothing_to_merge_and_is_written_with_its_head(data, tmp_path):
    assert status("--data", data, "--method", "linear", "--out", tmp_path / "run", *QUICK) == 0
    assert status("merge", tmp_path / "run", "--out", tmp_path / "m.safetensors") == 0
    state, head = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert torch.equal(state["head.weight"], head["head.weight"])
    base = timm.create_model(Settings.model, pretrained=True, num_classes=10)
    assert torch.equal(state["blocks.0.attn.qkv.weight"], base.blocks[0].attn.qkv.weight)
