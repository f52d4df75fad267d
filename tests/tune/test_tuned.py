"""The file of measured entries: what is found in it, when nothing is, and what it costs where it is damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from rlrr_kernels.backends import tuned
from rlrr_kernels.backends.tuned import Where, find, kernels_digest, parse
from tests.tune.entries import ANY, CPU, PROBLEM, TILE, WHERE, entry, file_of

HERE = Where.of(CPU, "triton")


def backend(problem=PROBLEM, **changes):
    found = find(problem._replace(**changes), CPU)
    return found and found.backend


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "grad_input"},
        {"n": 3072},
        {"k": 768},
        {"groups": 3},
        {"dtype": torch.bfloat16},
        {"weight_dtype": torch.bfloat16},
        {"tf32": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_pass_shape_or_dtype_gets_nothing(file, change):
    file_of(file, entry())
    assert backend() == "reference"
    assert backend(**change) is None


@pytest.mark.parametrize(
    ("name", "value", "holds"),
    [
        ("device", HERE.device, True),
        ("device", "NVIDIA H200", False),
        ("device", "cuda", False),
        ("capability", (9, 0), False),
        ("triton", HERE.triton, True),
        ("triton", "0.0, ptxas 1", False),
        ("kernels", HERE.kernels, True),
        ("kernels", "0123456789abcdef", False),
    ],
)
def test_another_device_triton_or_state_of_the_kernels_gets_nothing(file, name, value, holds):
    file_of(file, entry(where=WHERE._replace(**{name: value}), tile=TILE))
    assert backend() == ("reference" if holds else None)


def test_a_gpu_is_told_by_its_name_and_capability(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    gpus = [torch.device("cuda", index) for index in range(2)]
    assert Where.of(gpus[1], "cuda") == ("GPU 1", (9, 1), None, None)
    assert Where.of(gpus[1], "triton")[2:] == HERE[2:] != (None, None)
    file_of(file, entry(where=Where.of(gpus[1], "triton")))
    assert find(PROBLEM, gpus[1]).backend == "reference"
    assert find(PROBLEM, gpus[0]) is find(PROBLEM, CPU) is None


@pytest.mark.parametrize(
    ("m", "name"),
    [
        (100, "a"),
        (141, "a"),
        (71, "a"),
        (142, "b"),  # by ratio 141.42 is as far from 100 as from 200
        (282, "b"),
        (283, None),  # 1.415 times
        (707, None),
        (708, "c"),
        (2000, "c"),
        (2829, None),
        (70, None),
    ],
)
def test_the_nearest_band_of_m_serves_if_it_is_near(file, m, name):
    file_of(file, entry(100, backend="a"), entry(200, backend="b"), entry(1001, 2000, backend="c"))
    assert backend(m=m) == name


def test_the_shape_s_own_entry_comes_before_one_for_any_which_holds_in_its_band_alone(file):
    file_of(file, entry(500, None, "any", **ANY), entry(1000, backend="own"))
    assert [backend(m=m) for m in (499, 500, 1000, 1400, 1415, 10**6)] == [None, "any", "own", "own", "any", "any"]
    assert backend(n=5, groups=7) == "any"


def test_of_equals_the_newest_counts_and_the_user_s_come_before_the_shipped(file):
    file_of(file, entry(backend="old"), entry(backend="new"))
    assert backend() == "new"
    wide = {"dtype": torch.float64, "weight_dtype": torch.float64}
    shipped = find(PROBLEM._replace(m=5000, **wide), CPU)
    assert shipped.backend == "reference"
    file_of(file, entry(2000, None, "mine", **ANY, **wide))
    tuned.reload()
    assert [backend(m=m, **wide) for m in (1999, 2000)] == ["reference", "mine"]


def test_the_file_is_read_once(file):
    file_of(file, entry(tile=TILE))
    assert find(PROBLEM, CPU) == entry(tile=TILE)
    assert find(PROBLEM, CPU).tile == TILE
    file.unlink()
    assert backend(m=1001) == "reference"
    assert tuned.backends("forward", torch.float32, torch.float32, CPU) == ("reference",)
    assert tuned.backends("grad_shift", torch.float32, torch.float32, CPU) == ()


def test_the_off_switch_leaves_the_shipped_part(file, monkeypatch):
    file_of(file, entry())
    monkeypatch.setenv("RLRR_TUNED", "0")
    assert backend() is None
    assert tuned.used(CPU)
    monkeypatch.setenv("RLRR_TUNED", "1")
    tuned.reload()
    assert backend() == "reference"


BROKEN = {
    "cut off": (lambda text: text[:-20], "not JSON"),
    "empty": (lambda text: "", "not JSON"),
    "not text": (lambda text: "\udcff", "not JSON"),
    "deep": (lambda text: "[" * 100000, "not JSON"),
    "a list": (lambda text: "[]", "expected {"),
    "of an older version": (lambda text: text.replace('"format": 2', '"format": 1'), "format: expected 2, got 1"),
    "with a bad entry": (lambda text: text.replace('"pass": "forward"', '"pass": "both"'), "entry 0: pass: expected "),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_file_costs_one_warning_and_nothing_else(file, how):
    change, words = BROKEN[how]
    file_of(file, entry()).write_text(change(file.read_text()), errors="surrogateescape")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backend() is None
        assert backend(m=1001) is None
    assert len(caught) == 1
    assert f"{file}: {words}" in str(caught[0].message)


def test_even_where_warnings_are_errors_it_raises_nothing(file, capsys):
    file.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend() is None
    assert str(file) in capsys.readouterr().err


def test_a_bad_entry_leaves_the_good_ones(file):
    content = json.loads(file_of(file, entry()).read_text())
    content["entries"] += [5, {**content["entries"][0], "n": -1}]
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"entry 1: expected an object, got 5 \(and 1 more\)"):
        assert backend() == "reference"


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing"])
def test_what_is_no_file_is_said_and_not_waited_for(file, kind):
    make = {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "missing": lambda: None}[kind]
    make()
    words = "there is no such file, though RLRR_TUNED_FILE names it" if kind == "missing" else "expected a file"
    with pytest.warns(UserWarning, match=words):
        assert backend() is None


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("RLRR_TUNED_FILE", "/some/where.json")
    assert str(tuned.default_file()) == "/some/where.json"
    monkeypatch.delenv("RLRR_TUNED_FILE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.default_file() == tmp_path / "rlrr_kernels" / "tuned.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuned.default_file() == tmp_path / "home" / ".cache" / "rlrr_kernels" / "tuned.json"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuned.Path, "home", homeless)
    assert tuned.default_file() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.users() == []


def test_reading_imports_neither_the_tuner_nor_triton():
    code = (
        "import sys, torch, rlrr_kernels; from rlrr_kernels import backend_for; x = torch.zeros(2, 4).double()\n"
        "backend_for(x, x); sys.exit(any(name.startswith(('rlrr_kernels.tune.', 'triton.')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD = entry(where=Where("GPU", (9, 0), "3.8.0, ptxas 12.8", "0123"), tile=TILE, measured={"seconds": 1e-5})


@pytest.mark.parametrize("one", [GOOD, replace(GOOD, where=WHERE, tile=None), entry(1, None, **ANY), entry(2, 3)])
def test_what_was_written_is_read(one):
    again = parse(json.loads(json.dumps(one.to_json())))
    assert (again, again.measured, again.key) == (one, one.measured, one.key)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "device": ["", 5, None],
        "capability": [[9], [9, "0"], [True, 0], 9],
        "triton": ["", 5],
        "kernels": [[]],
        "pass": ["backward", ["forward"], None],
        "dtype": ["float8", 5, None],
        "weight_dtype": ["int8"],
        "tf32": [0, None, "false"],
        "n": [0, True, 768.0, 2**50, "768", None],
        "k": [-1, None],
        "groups": [0],
        "tokens": [5, [1], [0, 5], [1.0, 5], [7, 6], [None, 5]],
        "backend": ["", 5, None],
        "tile": [5, [1], {"block_m": 0}, {"block_m": True}, {"block_m": "64"}],
        "measured": [[], 5],
    }.items(),
)
def test_a_bad_field_is_named(field, values):
    raw = json.loads(json.dumps(GOOD.to_json()))
    for value in values:
        with pytest.raises(ValueError, match=rf"^\S*\b{'n, k' if value is None and field in 'nk' else field}\b.*: "):
            parse({**raw, field: value})
    optional = field in ("capability", "triton", "kernels", "groups", "tile", "measured")
    if not optional:
        with pytest.raises(ValueError, match=field):
            parse({name: value for name, value in raw.items() if name != field})


def test_any_change_of_a_kernel_changes_the_digest(tmp_path):
    source = kernels_digest.__wrapped__.__defaults__[0]

    def digest(change: str = "") -> str:
        folder = tmp_path / (change.replace("/", "_") or "same")
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"))
        if change:
            (folder / change).parent.mkdir(exist_ok=True)
            with open(folder / change, "a") as file:
                file.write("\n")
        return kernels_digest(folder)

    assert digest() == kernels_digest()
    for name in ("forward", "grad_input", "grad_scales", "tiles", "launch", "new/a_new_kernel"):
        assert digest(f"{name}.py") != kernels_digest(), name
    for name in ("choose", "layer_norm"):  # what only chooses, or is not tuned, may change
        assert digest(f"{name}.py") == kernels_digest(), name
