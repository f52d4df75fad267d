"""Runs of every method of ``rlrr-finetune``, analysed: the weights are those that the trained model computes with."""

import json

import pytest
import torch

from rlrr_kernels import apply_rlrr, save_adapter
from rlrr_kernels.analysis import base_weights, full_checkpoint, lora_adapter, rlrr_adapter, ssf_checkpoint
from rlrr_kernels.analysis.__main__ import main
from rlrr_kernels.finetune.backbone import apply_lora, apply_ssf
from rlrr_kernels.finetune.loop import train
from rlrr_kernels.finetune.saved_run import open_run
from tests.finetune.runs import prepared
from tests.small_models import small_vit

READERS = {"rlrr": rlrr_adapter, "ssf": ssf_checkpoint, "lora": lora_adapter, "full": full_checkpoint}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Method -> folder of a run of one epoch."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("runs")
    for method in READERS:
        options = {"epochs": 1, "warmup_epochs": 0, "lora_rank": 3 * (method == "lora")}
        train(prepared(folder, (64, 20, 20), method=method, out=folder / method, **options), quiet=True)
    return {method: folder / method for method in READERS}


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize("part", [".", "adapter"])
def test_a_run_is_read_as_the_weights_that_it_computes_with(runs, method, part):
    base = base_weights(str(runs["rlrr"]))
    tuned = READERS[method](runs[method] / part, base)
    assert tuned.updates.keys() == base.keys()
    assert len(base) == 20
    assert {"head.weight", "head.bias"} <= set(tuned.skipped)
    assert not [name for name in tuned.skipped if name.startswith("blocks.") and "norm" not in name]
    model = open_run(runs[method], {}).model()
    with torch.no_grad():
        for name, update in tuned.updates.items():
            layer, updated = model.get_submodule(name), update(base[name]).float()
            x = torch.eye(updated.shape[1])
            computed = (layer(x) - layer(torch.zeros(1, len(x)))).T
            assert torch.allclose(computed, updated, atol=2e-6)
            assert not torch.allclose(base[name], updated, atol=1e-4)


def test_the_program_compares_runs_of_all_four_methods(runs, tmp_path):
    given = [word for method, folder in runs.items() for word in (f"--{method}", str(folder))]
    out = tmp_path / "out"
    assert main([str(runs["ssf"]), *given, "--layers", "blocks.0.attn.proj", "--top", "2", "--out", str(out)]) == 0
    found = {
        m["label"]: m["layers"]["blocks.0.attn.proj"]
        for m in json.loads((out / "analysis.json").read_text())["methods"]
    }
    assert found["RLRR"]["share_rescaling"] == pytest.approx(1, abs=1e-4)
    assert found["SSF"]["share_out"] == pytest.approx(1, abs=1e-4)
    assert found["LoRA"]["update_rank"] == 3
    assert found["full"]["update_rank"] > 3


@pytest.mark.parametrize("method", READERS)
def test_a_run_of_another_method_is_refused_by_name(runs, method):
    base = base_weights(str(runs[method]))
    for other in READERS.keys() - {method}:
        with pytest.raises(ValueError, match=f"expected an adapter of method {method}, got one of {other}"):
            READERS[method](runs[other], base)


@pytest.mark.parametrize("method", ["rlrr", "ssf", "lora"])
def test_a_run_on_other_weights_is_refused(runs, method):
    other = {name: torch.randn_like(weight) for name, weight in base_weights(str(runs[method])).items()}
    with pytest.raises(ValueError, match=r"other weights than the base's, by the fingerprint of blocks"):
        READERS[method](runs[method], other)


def test_an_adapter_that_was_saved_by_hand_says_how_it_was_tuned_by_its_tensors(tmp_path):
    """Its metadata is the user's; of LoRA it would have to say the scaling, so PEFT's own folder is asked for."""
    base = {n: m.weight for n, m in small_vit().named_modules() if isinstance(m, torch.nn.Linear) and n != "head"}
    save_adapter(apply_ssf(small_vit()), tmp_path / "ssf", {"method": "mine"})
    assert ssf_checkpoint(tmp_path / "ssf", base).updates.keys() == base.keys()
    with pytest.raises(ValueError, match="expected an RLRR adapter, and there is no scale_out in it"):
        rlrr_adapter(tmp_path / "ssf", base)
    save_adapter(apply_rlrr(small_vit()), tmp_path / "rlrr")
    with pytest.raises(ValueError, match=r"nothing that was tuned, such as .*norm.*, is a linear of the base"):
        ssf_checkpoint(tmp_path / "rlrr", base)
    pytest.importorskip("peft")
    save_adapter(apply_lora(small_vit(), 2), tmp_path / "lora", {"method": "mine"})
    with pytest.raises(ValueError, match=r"lora: its scaling is not known; expected a run of rlrr-finetune"):
        lora_adapter(tmp_path / "lora", base)
