"""The chunks of the whole suite: a process for each, in turn, also after one has failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import chunks
from benchmarks.chunks import MODELS


def test_every_layer_and_dtype_is_in_one_chunk_and_every_chunk_has_a_suite():
    names = list(chunks.chunks())
    assert len(names) == len(set(names))
    layers = {chunks.layer_chunk(s, d) for shapes in MODELS.values() for s in shapes for d in chunks.DTYPES}
    ranks = {"layer-vit_b-r8", "layer-vit_b-r32"}
    assert layers | ranks == {name for name in names if name.startswith("layer-")}
    for name in names:
        assert not any(other != name and other.startswith(name) for other in names)  # --chunk takes a prefix
        command = chunks.command(name)
        assert Path(command[3]).is_file()
        assert command[command.index("--chunk") + 1] == name
        assert command[-1] == f"make bench-gpu CHUNK={name}"


def test_chunks_are_listed_and_a_wrong_one_is_named(capsys):
    assert chunks.main(["step-vit_b", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["step-vit_b-64", "step-vit_b-256", "step-vit_b-r8", "step-vit_b-r32"]
    with pytest.raises(SystemExit, match="2"):
        chunks.main(["vit"])
    assert "prefix: expected the start of a chunk's name (see --list), got 'vit'" in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch):
    """What is called on a machine with a GPU, in order; the chunk "norm" runs out of time."""
    calls: list = []

    def run_command(command, seconds):
        calls.append((command, seconds))
        return 124 if "norm" in command else 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(chunks.processes, "exit_on_signals", lambda: calls.append("signals"))
    monkeypatch.setattr(chunks.check, "failures", lambda device: calls.append("check") or ({}, {}))
    monkeypatch.setattr(chunks.processes, "run_command", run_command)
    return calls


def test_chunks_run_one_after_another_with_the_options_that_are_given(started, capsys):
    assert chunks.main(["--seconds", "12", "--", "-k", "not autotune"]) == 1
    # without the signals' handlers the processes of the check would be left behind
    assert started[:2] == ["signals", "check"]
    assert [command[command.index("--chunk") + 1] for command, _ in started[2:]] == list(chunks.chunks())
    assert {(command[command.index("-k") + 1], seconds) for command, seconds in started[2:]} == {("not autotune", 12)}
    printed = capsys.readouterr()
    assert f"of {len(started) - 2}: norm\n" in printed.out
    assert printed.err == "norm: its time was up\nchunks with a failed case, or not at their end: norm\n"


def test_a_backend_that_is_wrong_or_unchecked_is_named(started, capsys, monkeypatch):
    found = {"triton": "forward: off"}, {"cuda": "forward: no memory"}
    monkeypatch.setattr(chunks.check, "failures", lambda device: found)
    assert chunks.main(["launch"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "backend triton is not measured, its check failed: forward: off",
        "backend cuda is measured unchecked, its check could not be made: forward: no memory",
    ]

    def full(device):
        raise OSError("no room")

    monkeypatch.setattr(chunks.check, "failures", full)
    assert chunks.main(["launch"]) == 2
    assert capsys.readouterr().err == "bench-gpu: what the check found cannot be kept: no room\n"


def test_without_a_gpu_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chunks.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench-gpu: no CUDA device is visible to torch; `pytest benchmarks/` measures a slice on a CPU"
    ]
