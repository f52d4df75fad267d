"""The file of raw results: it is whole or not there, and has every field that its readers need."""

from __future__ import annotations

import subprocess

import pytest
import torch

from benchmarks import results
from benchmarks.results import LaunchCase, LayerCase, Result

LAYER = LayerCase("ViT-B/16", "qkv", 2304, 768, 3, 197, 1, "float32", "both", results.OURS, "cpu", True)


def test_what_is_written_is_what_is_loaded(tmp_path):
    memory = {"extra_bytes": 5, "saved_bytes": 0, "saved_x": True}
    measured = Result(LAYER, [4.0, 1.0, 3.0, 2.0], memory, clock=results.WALL, copies=2)
    failed = Result(LaunchCase("no_grad", "bfloat16", results.TRITON, None), [], {}, "RuntimeError: no")
    folder = tmp_path / "new" / "device"
    path = results.write(folder, "layer", "layer-vit_b", "make bench", [measured, failed])
    assert path == folder / "layer-vit_b.json"
    (folder / "other.json").write_text('{"results": []}')  # of another kind
    (chunk,) = results.load(folder)
    assert (chunk["suite"], chunk["chunk"], chunk["command"]) == ("layer", "layer-vit_b", "make bench")
    assert chunk["device"] == results.device_name()
    assert chunk["versions"].keys() == {"rlrr_kernels", "torch", "triton", "python", "cuda", "driver", "peft", "timm"}
    assert chunk["versions"]["torch"] == torch.__version__
    assert str(torch.get_num_threads()) in chunk["processor"]
    first, second = chunk["results"]
    assert first == {
        **{"model": "ViT-B/16", "layer": "qkv", "n": 2304, "k": 768, "groups": 3, "m": 197, "images": 1},
        **{"dtype": "float32", "direction": "both", "implementation": "rlrr_kernels", "backend": "cpu"},
        **{"same_function": True, "rank": 1, "seconds": [4.0, 1.0, 3.0, 2.0], "median": 2.5, "q1": 1.75, "q3": 3.25},
        **{"clock": "wall", "copies": 2},
        **memory,
    }
    assert second == {
        **{"call": "no_grad", "dtype": "bfloat16", "implementation": "rlrr_kernels/triton", "backend": None, "rank": 1},
        "error": "RuntimeError: no",
    }
    lines = path.read_text().splitlines()
    assert sum(line.startswith('  {"') for line in lines) == 2  # a line for each result


def test_a_file_says_what_it_was_measured_with(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "source", lambda: {"commit": "abc", "dirty": True})
    monkeypatch.setenv("RLRR_TUNED", "0")
    monkeypatch.setenv("RLRR_TUNED_FILE", "/somebody/home/tuned.json")
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        results.write(tmp_path, "layer", "a", "c", [], rounds=(5, 30))
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    (head,) = results.load(tmp_path)
    assert (head["commit"], head["dirty"], head["tf32"], head["complete"]) == ("abc", True, True, True)
    assert {k: v for k, v in head["environment"].items() if k.startswith("RLRR_TUNED")} == {
        "RLRR_TUNED": "0",
        "RLRR_TUNED_FILE": "tuned.json",
    }
    assert head["rounds"] == [5, 30]
    assert isinstance(head["tuned"], bool)
    results.write(tmp_path, "layer", "a", "c", [])
    assert results.load(tmp_path)[0]["tf32"] is False


def test_the_sources_revision_and_whether_they_differ_from_it(tmp_path, monkeypatch):
    def git(*arguments):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *settings, *arguments], text=True).strip()

    def source():
        results.source.cache_clear()
        return results.source()

    monkeypatch.setattr(results, "ROOT", tmp_path)
    try:
        for given, expected in (("0123abc", "0123abc"), ("", None)):  # a copy without git's folder
            monkeypatch.setenv("RLRR_COMMIT", given)
            assert source() == {"commit": expected, "dirty": None}
        git("init", "-q")
        (tmp_path / "code.py").write_text("1")
        git("add", ".")
        git("commit", "-qm", "a")
        assert source() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
        (tmp_path / "benchmarks" / "results").mkdir(parents=True)
        (tmp_path / "benchmarks" / "results" / "new.json").write_text("1")
        assert source()["dirty"] is False
        (tmp_path / "code.py").write_text("2")
        assert source()["dirty"] is True
    finally:
        results.source.cache_clear()


def test_a_partial_run_lies_beside_a_complete_one_and_is_read_only_without_it(tmp_path):
    def write(seconds, complete):
        return results.write(tmp_path, "layer", "a", "c", [Result(LAYER, [seconds])], complete)

    def loaded():
        return [(c["complete"], c["results"][0]["median"]) for c in results.load(tmp_path)]

    assert write(1.0, False).name == "a-partial.json"
    assert loaded() == [(False, 1.0)]
    assert write(2.0, True).name == "a.json"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    write(3.0, False)
    assert len(list(tmp_path.iterdir())) == 2
    assert loaded() == [(True, 2.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "a.json: expected JSON"), ('{"suite": "layer"}', "a.json: expected the field 'chunk', got suite")],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        results.load(tmp_path)
