"""``rlrr-analyze`` as a user meets it."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import rlrr_kernels.finetune.embedded  # noqa: F401  registers the model
from rlrr_kernels import apply_rlrr, save_adapter
from rlrr_kernels.analysis.__main__ import COLUMNS, main
from rlrr_kernels.analysis.comparison import SUMMARY
from tests.small_models import stir

MODEL = "vit_embedded_patch7_28"


@pytest.fixture
def tuned(tmp_path):
    """An RLRR run folder and an SSF file, of the embedded model."""
    model = timm.create_model(MODEL, pretrained=True)
    save_file({"blocks.0.mlp.fc1.ssf_scale": torch.full((512,), 2.0)}, tmp_path / "ssf.safetensors")
    save_adapter(stir(apply_rlrr(model)), tmp_path / "run" / "adapter")
    settings = {"model": MODEL, "pretrained": True, "checkpoint": None}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"settings": settings}))
    return tmp_path


def test_it_writes_json_and_a_figure_and_prints_the_medians(tuned, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tuned / "made" / "analysis"
    arguments = [str(tuned / "run"), "--rlrr", str(tuned / "run"), "--ssf", str(tuned / "ssf.safetensors")]
    assert main([*arguments, "--out", str(out), "--layers", "blocks.0.*", "--top", "2"]) == 0
    found = json.loads((out / "analysis.json").read_text())
    assert found["base"] == {"name": str(tuned / "run"), "checkpoint": None}
    assert [m["label"] for m in found["methods"]] == ["RLRR", "SSF"]
    assert found["methods"][0]["layers"]["blocks.0.attn.q"]["top"] == 2
    assert found["methods"][1]["layers"]["blocks.0.mlp.fc1"]["relative_update"] == pytest.approx(1)
    assert (out / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["analysis.json", "analysis.png"]
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "SSF" in line)
    assert "100.00%" in row  # the relative update: twice the weight
    assert "0.00°" in row
    assert f"wrote {out / 'analysis.json'}" in printed
    assert {key for key, _ in COLUMNS.values()} == set(SUMMARY)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([MODEL], "give at least one of --rlrr, --ssf, --lora, --full"),
        (["vit_nonsense", "--full", "x.pth"], "'vit_nonsense' is no file or folder"),
        ([MODEL, "--full", "x.pth"], "x.pth does not exist"),
        ([MODEL, "--rlrr", "gone"], "gone: expected an adapter folder or a run folder"),
        ([MODEL, "--full", "x.pth", "--top", "0"], "--top: expected 1 or more, got 0"),
        ([MODEL, "--full", "x.pth", "--device", "cuda:99"], "--device: 'cuda:99' cannot be used"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("rlrr-analyze: error: ")
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_writes_nothing(tuned, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlrr_kernels.analysis.__main__.analyze", interrupt)
    assert main([MODEL, "--rlrr", str(tuned / "run"), "--out", str(tuned / "out")]) == 130
    assert not list((tuned / "out").iterdir())
    assert "interrupted" in capsys.readouterr().err
