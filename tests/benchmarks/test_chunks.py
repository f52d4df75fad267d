"""Chunks of the suites: one process each, in turn, whatever became of those before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import cases, chunks
from benchmarks.cases import MODELS


def test_every_layer_and_dtype_is_in_one_chunk_and_every_chunk_has_a_suite():
    names = list(cases.chunks())
    assert len(names) == len(set(names))
    layers = {cases.layer_chunk(s, d) for shapes in MODELS.values() for s in shapes for d in cases.DTYPES}
    assert layers == {name for name in names if name.startswith("layer-")}
    for name in names:
        assert not any(other != name and other.startswith(name) for other in names)  # --chunk takes a prefix
        command = chunks.command(name)
        assert Path(command[3]).is_file()
        assert command[command.index("--chunk") + 1] == name
        assert command[-1] == f"make bench-gpu CHUNK={name}"


def test_chunks_run_one_after_another_whatever_fails(capsys):
    started = []

    def start(command: list[str]) -> int:
        started.append(command[command.index("--chunk") + 1])
        return int(started[-1] == "norm")

    assert chunks.run(["launch", "norm", "step-vit_b-64"], start) == ["norm"]
    assert started == ["launch", "norm", "step-vit_b-64"]
    assert "chunk 2 of 3: norm" in capsys.readouterr().out


def test_chunks_are_listed_and_a_wrong_one_is_named(capsys):
    assert chunks.main(["step-vit_b", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["step-vit_b-64", "step-vit_b-256"]
    with pytest.raises(SystemExit, match="2"):
        chunks.main(["vit"])
    assert "prefix: expected the start of a chunk's name (see --list), got 'vit'" in capsys.readouterr().err


def test_what_cannot_be_kept_or_is_wrong_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(chunks.processes, "run", lambda command, seconds: 0)
    order: list[str] = []
    monkeypatch.setattr(chunks.processes, "exit_on_signals", lambda: order.append("signals"))

    def found(device):
        order.append("check")
        return {"triton": "forward: off"}, {"cuda": "forward: no memory"}

    monkeypatch.setattr(chunks.check, "failures", found)
    assert chunks.main(["norm"]) == 1
    assert order == ["signals", "check"]  # a signal would leave the check's processes behind
    assert capsys.readouterr().err.splitlines()[:2] == [
        "backend triton is not measured, its check failed: forward: off",
        "backend cuda is measured unchecked, its check could not be made: forward: no memory",
    ]

    def full(device):
        raise OSError("no room")

    monkeypatch.setattr(chunks.check, "failures", full)
    assert chunks.main(["norm"]) == 2
    assert capsys.readouterr().err == "bench-gpu: what the check found cannot be kept: no room\n"


def test_a_chunks_time_and_more_options_are_asked_for(monkeypatch):
    """Each chunk in a process of its own, with the time and pytest's options that the command line gives."""
    started: list[tuple[list[str], float]] = []
    monkeypatch.setattr(chunks.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(chunks.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(chunks.check, "failures", lambda device: ({}, {}))
    monkeypatch.setattr(chunks.processes, "exit_on_signals", lambda: None)
    monkeypatch.setattr(chunks.processes, "run", lambda command, seconds: started.append((command, seconds)) or 124)
    assert chunks.main(["step-vit_b-64", "--seconds", "12", "--", "-k", "not autotune"]) == 1
    ((command, seconds),) = started
    assert seconds == 12
    assert command[command.index("-k") + 1] == "not autotune"


def test_without_a_gpu_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chunks.main([]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "bench-gpu: no CUDA device is visible to torch; `pytest benchmarks/` measures a slice on a CPU"
    ]
