"""``rlrr-finetune export``: the program is equivalent to the tuned model, or no file is written."""

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from rlrr_kernels import apply_rlrr, save_adapter
from rlrr_kernels.finetune.commands import export
from tests.finetune.commands.conftest import status

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.ONNX_PACKAGES), reason="the ONNX packages are missing"
)


NAMES = ["b", "a", "é", "\udcff", "c"]


@timm.models.register_model
def vit_to_export(pretrained=False, **options):
    """One small block, as exporters take seconds for more."""
    shape = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return timm.models.build_model_with_cfg(VisionTransformer, "vit_to_export", False, **shape, **options)


class Adapter(NamedTuple):
    """An adapter with large updates, and the options that find its model."""

    folder: Path
    words: list[str]
    model: torch.nn.Module


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("an adapter")
    torch.manual_seed(0)
    model = timm.create_model("vit_to_export", num_classes=5)
    save_file(model.state_dict(), folder / "base.safetensors")
    save_adapter(apply_rlrr(model), folder / "adapter", class_names=NAMES)
    return Adapter(folder / "adapter", ["--checkpoint", str(folder / "base.safetensors")], model.eval())


def start(adapter, form, out, *words):
    return status("export", adapter.folder, "--format", form, "--out", out, *adapter.words, *words)


def run_torch(path, images):
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def run_onnx(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def names_torch(path):
    extra = {"label_names.json": ""}
    torch.export.load(path, extra_files=extra)
    return json.loads(extra["label_names.json"])


def names_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return json.loads(session.get_modelmeta().custom_metadata_map["label_names"])


@pytest.mark.parametrize(
    ("form", "suffix", "run", "names"),
    [
        ("torch", ".pt2", run_torch, names_torch),
        pytest.param("onnx", ".onnx", run_onnx, names_onnx, marks=[needs_onnx, pytest.mark.slow]),
    ],
)
def test_the_program_gives_the_tuned_logits_for_batches_of_any_size(
    adapter, tmp_path, capsys, form, suffix, run, names
):
    out = tmp_path / f"a program{suffix}"
    assert start(adapter, form, out) == 0
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 28, 28)
        with torch.no_grad():
            logits = adapter.model(images)
        torch.testing.assert_close(run(out, images), logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    assert names(out) == NAMES
    assert "[batch, 3, 28, 28] -> [batch, 5]" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("size", export.BATCHES)
def test_a_program_that_differs_at_one_batch_size_is_an_error_and_leaves_no_file(
    adapter, tmp_path, capsys, monkeypatch, size
):
    def wrong(model, images, path, labels):
        path.write_text("a program")
        return lambda batch: model(batch) + 0.01 * (len(batch) == size)

    monkeypatch.setattr(export, "export_torch", wrong)
    assert start(adapter, "torch", tmp_path / "m.pt2") == 1
    assert "the exported program's logits differ by 0.01, more than 0.0001 times" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert start(adapter, "torch", tmp_path / "m.pt2", "--tolerance", "0.1") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_a_nan_is_a_difference(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "export_torch", lambda model, images, path, labels: lambda batch: model(batch) * float("nan")
    )
    assert start(adapter, "torch", tmp_path / "m.pt2") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_onnx_packages_are_one_line_with_the_remedy(adapter, tmp_path, capsys, monkeypatch):
    real, there = importlib.util.find_spec, importlib.util.find_spec("torch")
    packages = {"onnx": there, "onnxscript": None, "onnxruntime": there}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages[name] if name in packages else real(name))
    assert start(adapter, "onnx", tmp_path / "m.onnx") == 2
    assert "onnx needs onnxscript: pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


def test_a_file_of_weights_beside_the_program_is_not_replaced_unasked(adapter, tmp_path, capsys):
    pytest.importorskip("onnx")
    (tmp_path / "m.onnx.data").write_text("mine")
    assert start(adapter, "onnx", tmp_path / "m.onnx") == 2
    assert "m.onnx.data exists" in capsys.readouterr().err
