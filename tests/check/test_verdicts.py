"""What was found is kept for this machine alone, and no file can break anything."""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import replace

import pytest
import torch
import triton

from rlrr_kernels.__main__ import info
from rlrr_kernels.backends import library, verdicts
from rlrr_kernels.backends.verdicts import Finding, Where, parse
from tests.check.conftest import CPU, findings, forget
from tests.oracle import require


def keep(file, found):
    assert verdicts.add(file, found) is None
    forget()


def test_findings_come_back_and_the_latest_of_a_pass_counts(file):
    assert verdicts.state("cpu", CPU) == "not yet checked"
    keep(file, findings(wrong="grad_input"))
    assert verdicts.found("cpu", CPU) == {f.which: f for f in findings(wrong="grad_input")}
    assert verdicts.state("cpu", CPU) == "failed: grad_input: y: not finite"
    assert verdicts.failure("cpu", CPU, ("forward", "grad_scales")) is None
    keep(file, [f for f in findings() if f.which == "grad_input"])
    assert verdicts.state("cpu", CPU) == "proven, 2026-01-02"
    assert len(json.loads(file.read_text())["entries"]) == 3


def test_a_backend_is_proven_by_all_its_passes(file):
    keep(file, findings()[:-1])
    assert verdicts.state("cpu", CPU) == "not yet checked"
    assert verdicts.failure("cpu", CPU) is None


@pytest.mark.parametrize("field", Where._fields)
def test_what_was_found_elsewhere_does_not_count(file, field):
    """Another device, driver, torch, Triton, version of the package, backend or build."""
    other = "cuda" if field == "subject" else "another"
    keep(file, [replace(f, where=f.where._replace(**{field: other})) for f in findings(wrong="forward")])
    assert verdicts.state("cpu", CPU) == "not yet checked"
    assert verdicts.failure("cpu", CPU) is None
    keep(file, findings())  # beside it
    assert verdicts.state("cpu", CPU) == "proven, 2026-01-02"
    assert len(json.loads(file.read_text())["entries"]) == 6


@pytest.mark.parametrize("subject", ["cpu", "cuda", "cuda-hopper"])
def test_a_library_that_is_rebuilt_is_another(file, tmp_path, monkeypatch, subject):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    path = tmp_path / f"librlrr_{subject[:4].strip('-')}.so"
    digests = [verdicts.build_of(subject)]
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        forget()
        digests.append(verdicts.build_of(subject))
    assert len(set(digests)) == 3
    assert digests[1] == digests[3]


def test_what_decides_which_kernels_run_is_part_of_the_build(monkeypatch):
    for subject, variable in (
        ("triton", "TRITON_PTXAS_PATH"),
        ("gluon", "TRITON_PTXAS_PATH"),
        ("cpu", "RLRR_CPU_CAPABILITY"),
    ):
        digests = set()
        for value in ("", "0"):
            monkeypatch.setenv(variable, value)
            verdicts.build_of.cache_clear()
            digests.add(verdicts.build_of(subject))
        verdicts.build_of.cache_clear()
        assert len(digests) == 2
    where = Where.of("cpu", CPU)
    assert (where.driver, where.triton_version, where.torch_version) == ("none", "none", torch.__version__)
    assert torch.backends.cpu.get_cpu_capability() in where.device
    assert Where.of("triton", CPU).triton_version == Where.of("gluon", CPU).triton_version == triton.__version__


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build  (dvs-builder@U22)",
    ],
)
def test_the_drivers_version_is_read(line, monkeypatch):
    monkeypatch.setattr(verdicts.Path, "read_text", lambda path: line + "\nGCC version:  gcc version 12.3.0\n")
    assert verdicts._driver.__wrapped__() == "535.129.03"


ENTRY = findings()[0].to_json()
HOSTILE = {
    "an empty object": '{"format": 1, "entries": [{}]}',
    "NaN": '{"format": 1, "entries": [NaN]}',
    "1e999": json.dumps({"format": 1, "entries": [{**ENTRY, "right": False}]}).replace("0.5", "1e999"),
    "another format": '{"format": 2, "entries": []}',
    **{
        f"{name} = {value!r}": json.dumps({"format": 1, "entries": [{**ENTRY, "right": False, name: value}]})
        for name, value in (
            ("subject", "reference"),
            ("subject", ["cpu"]),
            ("pass", "layer_norm"),
            ("right", 0),
            ("right", None),
            ("ratio", "0.5"),
            ("ratio", True),
            ("reason", "\x1b[2J"),
            ("reason", "x" * 501),
            ("reason", None),
            ("date", "yesterday\nand before"),
            ("device", 5),
            ("build", ""),
        )
    },
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_file_is_one_warning(file, content):
    file.write_text(content)
    with pytest.warns(UserWarning, match=r"checked.json: .*; left out: `python -m rlrr_kernels check`"):
        assert verdicts.failure("cpu", CPU) is None
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        assert verdicts.state("cpu", CPU) == "not yet checked"


def test_it_can_be_switched_off(file, monkeypatch):
    keep(file, findings(wrong="forward"))
    monkeypatch.setenv("RLRR_CHECKED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.failure("cpu", CPU) is None


def test_it_lies_beside_the_tuned_table(monkeypatch, tmp_path):
    monkeypatch.delenv("RLRR_CHECKED_FILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.default_file() == tmp_path / "rlrr_kernels" / "checked.json"


def test_entries_are_what_they_were():
    """A change of the file's layout needs another FORMAT."""
    where = Where("a GPU", "580.1", "2.14.1", "3.8.0", "0.1.0", "triton", "abc")
    finding = Finding(where, "layer_norm", False, 3.5, "ds: off", "2026-01-02")
    raw = {
        **{"device": "a GPU", "driver": "580.1", "torch_version": "2.14.1", "triton_version": "3.8.0"},
        **{"version": "0.1.0", "subject": "triton", "build": "abc"},
        **{"pass": "layer_norm", "right": False, "ratio": 3.5, "reason": "ds: off", "date": "2026-01-02"},
    }
    assert (verdicts.FORMAT, finding.to_json(), parse(raw)) == (1, raw, finding)


def test_info_says_what_is_proven(file):
    def proof():
        return [line.strip() for line in info()][-1].split(maxsplit=1)

    require("cpu")
    if torch.cuda.is_available():
        pytest.skip("the last lines are the GPU's")
    assert proof() == ["cpu", "not yet checked"]
    for wrong, words in ((None, "proven, 2026-01-02"), ("grad_input", "failed: grad_input: y: not finite")):
        verdicts.add(file, findings(wrong=wrong))
        forget()
        with pytest.warns(UserWarning, match="failed its check") if wrong else contextlib.nullcontext():
            assert proof() == ["cpu", words]
