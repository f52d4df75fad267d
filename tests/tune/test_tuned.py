"""The file of measured entries: what is found in it, when nothing is, and what it costs where it is damaged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from rlrr_kernels.backends import choice, tuned
from rlrr_kernels.backends.triton import choose, launch
from rlrr_kernels.backends.tuned import find, parse
from rlrr_kernels.backends.verdicts import Where
from tests.tune.entries import CPU, PROBLEM, TILE, entry, file_of

HERE = Where.of("triton", CPU)


def backend(problem=PROBLEM, **changes):
    found = find(problem._replace(**changes), CPU)
    return found and found.backend


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "grad_input"},
        {"m": 999},
        {"n": 3072},
        {"k": 768},
        {"groups": 3},
        {"dtype": torch.bfloat16},
        {"weight_dtype": torch.bfloat16},
        {"tf32": True},
        {"rank": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_pass_shape_or_dtype_gets_nothing(file, change):
    file_of(file, entry())
    assert backend() == "reference"
    assert backend(**change) is None


@pytest.mark.parametrize("name", [None, *Where._fields])
def test_another_device_or_version_of_anything_gets_nothing(file, name):
    where = HERE if name is None else HERE._replace(**{name: "another"})
    file_of(file, entry(device=where.device, where=where, backend="triton", tile=TILE))
    assert backend() == ("triton" if name is None else None)


def test_a_finding_of_one_backend_s_build_says_nothing_of_another(file):
    file_of(file, entry(device=HERE.device, where=HERE, backend="cpu"))
    assert backend() is None


def test_a_gpu_is_told_by_its_name(file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    gpus = [torch.device("cuda", index) for index in range(2)]
    file_of(file, entry(device="GPU 1"))
    assert find(PROBLEM, gpus[1]).backend == "reference"
    assert find(PROBLEM, gpus[0]) is find(PROBLEM, CPU) is None


@pytest.mark.parametrize(
    ("m", "name"),
    [(70, None), (71, "a"), (140, "a"), (141, "b"), (282, "b"), (283, None), (400, "any"), (10**6, "any")],
)
def test_of_bands_that_hold_m_the_nearest_counts_and_the_shape_s_own_before_one_for_any(file, m, name):
    bands = {"a": (71, 150), "b": (130, 282)}  # the middles are 103 and 191, by ratio 140.6 lies between
    known = dict(zip("ab", ("panels", "triton"), strict=True)) | {"any": "cpu", None: None}
    own = [entry(*band, backend=known[one]) for one, band in bands.items()]
    others = entry(60, 282, "cpu", layer=None, kernel="grad_input"), entry(300, math.inf, "cpu", layer=None)
    file_of(file, *others, *own)
    assert backend(m=m) == known[name]
    file_of(file, entry(1, math.inf, "reference", layer=None), *own)
    choice.reload()
    assert backend(m=m) == (known[name] if name in bands else "reference")


def test_the_user_s_entries_come_before_the_shipped(file):
    wide = {"dtype": torch.float64, "weight_dtype": torch.float64}
    file_of(file)
    assert [backend(m=m, **wide) for m in (1023, 1024, 10**6)] == [None, "reference", "reference"]
    choice.reload()
    file_of(file, entry(1024, math.inf, "cpu", layer=None, **wide))
    assert backend(m=5000, **wide) == "cpu"


def test_the_file_is_read_once(file):
    file_of(file, entry(tile=TILE))
    assert find(PROBLEM, CPU) == entry(tile=TILE)
    assert find(PROBLEM, CPU).tile == TILE
    file.unlink()
    assert backend() == "reference"
    assert backend(m=999) is None


def test_the_off_switch_leaves_the_shipped_part(file, monkeypatch):
    file_of(file, entry())
    monkeypatch.setenv("RLRR_TUNED", "0")
    assert backend() is None
    assert tuned.entries(CPU) == tuned.shipped()
    monkeypatch.setenv("RLRR_TUNED", "1")
    choice.reload()
    assert backend() == "reference"


BROKEN = {
    "cut off": (lambda text: text[:-20], "the content is not JSON"),
    "empty": (lambda text: "", "the content is not JSON"),
    "not text": (lambda text: "\udcff", "the content is not JSON"),
    "deep": (lambda text: "[" * 100000, "the content is not JSON"),
    "a list": (lambda text: "[]", "the content: expected a JSON object, got list"),
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
    content["entries"] += [5, {**content["entries"][0], "tf32": 0}]
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"entry 1: expected an object, got 5 \(and 1 more\)"):
        assert backend() == "reference"


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "link to itself"])
def test_a_path_that_is_no_file_is_one_warning(file, kind):
    make = {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "link to itself": lambda: file.symlink_to(file)}
    make.get(kind, lambda: None)()
    words = {"missing": "there is no such file, though RLRR_TUNED_FILE names it", "link to itself": "symbolic links"}
    words = words.get(kind, "expected a file")
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
        assert tuned.of_user() == ()


def test_reading_imports_neither_the_tuner_nor_triton():
    code = (
        "import sys, torch, rlrr_kernels; from rlrr_kernels import backend_for; x = torch.zeros(2, 4).double()\n"
        "backend_for(x, x); sys.exit(any(name.startswith(('rlrr_kernels.tune.', 'triton.')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


GOOD = entry(device="GPU", where=HERE._replace(device="GPU"), backend="triton", tile=TILE, measured={"seconds": 1e-5})


@pytest.mark.parametrize(
    "one", [GOOD, replace(GOOD, where=None, tile=None, rank=8), entry(1, math.inf, layer=None), entry(2, 3)]
)
def test_what_was_written_is_read(one):
    again = parse(json.loads(json.dumps(one.to_json())))
    assert (again, again.measured, again.key) == (one, one.measured, one.key)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "device": ["", 5, None],
        "where": [5, [], {"device": "GPU"}],
        "pass": ["backward", ["forward"], None],
        "dtype": ["float8", 5, None],
        "weight_dtype": ["int8", []],
        "tf32": [0, None, "false"],
        "rank": [0, 129, True, "1", None],
        "layer": [
            5,
            [768, 768],
            [768, 768, 5],
            [0, 1, 1],
            [True, 768, 1],
            [768.0, 768, 1],
            [2**50, 1, 1],
            ["768", 1, 1],
        ],
        "tokens": [5, [1], [0, 5], [1.0, 5], [7, 6], [None, 5]],
        "backend": ["", "cudnn", 5, None],
        "tile": [5, [1], {"block_m": -1}, {"block_m": True}, {"block_m": "64"}, {"block_m": 2**40}],
        "measured": [[], 5],
    }.items(),
)
def test_a_bad_field_is_named(field, values):
    raw = json.loads(json.dumps(GOOD.to_json()))
    for value in values:
        with pytest.raises(ValueError, match=f"^{field}: "):
            parse({**raw, field: value})
    if field not in ("where", "rank", "layer", "tile", "measured"):
        with pytest.raises(ValueError, match=f"^{field}: "):
            parse({name: value for name, value in raw.items() if name != field})


@pytest.mark.parametrize(
    "tile", [{}, {"rows": 64}, {**TILE, "more": 1}, {**TILE, "block_m": 24}, {**TILE, "num_stages": 11}]
)
def test_a_tile_that_no_kernel_takes_is_not_launched(file, monkeypatch, tile):
    """A file that was edited is no reason to end a run."""
    file_of(file, entry(80, layer=(48, 64, 1), backend="triton", tile=tile))
    problem = PROBLEM._replace(m=80, n=48, k=64)
    x = torch.empty(80, 64)
    assert find(problem, CPU).tile == tile
    assert launch._chosen(problem, x, True) == choose.choose(problem, launch.INTERPRETED_DEVICE)


def test_a_tile_that_was_measured_is_launched_by_its_own_backend_alone(file):
    problem = PROBLEM._replace(m=80, n=48, k=64)
    rule = choose.choose(problem, launch.INTERPRETED_DEVICE)
    assert asdict(rule) != TILE
    for name, expected in (("triton", choose.Choice(**TILE)), ("gluon", rule)):
        file_of(file, entry(80, layer=(48, 64, 1), backend=name, tile=TILE))
        choice.reload()
        assert launch._chosen(problem, torch.empty(80, 64), True) == expected
