"""What the launcher gets from a table, and when it gets nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch

from rlrr_kernels.backends.triton import config as configs
from rlrr_kernels.backends.triton import tuned, tuned_file
from rlrr_kernels.backends.triton.config import Config
from rlrr_kernels.backends.triton.tuned import Table
from rlrr_kernels.tune import store
from tests.tune.entries import CONFIG, DEVICE, FORWARD, GPU, GRAD_INPUT, GRAD_SCALES, NARROW, WHERE, entry

QUERY = ("forward", 1000, *FORWARD[1:], 0)


def lookup(table, m, layer=FORWARD, device=DEVICE):
    return table.lookup(WHERE, layer, m, device)


@pytest.mark.parametrize(
    "change",
    [{name: 1 if isinstance(value, int) else "other"} for name, value in FORWARD._asdict().items() if value != 1]
    + [{"groups": 3}],
    ids=lambda change: next(iter(change)),
)
def test_another_layer_gets_nothing(change):
    assert lookup(Table([entry()]), 1000) == CONFIG
    assert lookup(Table([entry()]), 1000, FORWARD._replace(**change)) is None


@pytest.mark.parametrize(
    "change", [{"gpu": "Other"}, {"capability": (8, 0)}, {"triton": "0.0"}, {"kernels": "0"}], ids=str
)
def test_another_gpu_triton_or_kernel_gets_nothing(change):
    assert Table([entry()]).lookup(WHERE._replace(**change), FORWARD, 1000, DEVICE) is None


def test_the_same_m_comes_before_the_nearest():
    table = Table([entry(1000), entry(1001, config=NARROW)])
    assert lookup(table, 1000) == CONFIG
    assert lookup(table, 1001) == NARROW
    assert lookup(table, 999) == CONFIG
    assert lookup(table, 1002) == NARROW


def test_the_last_entry_of_the_same_key_counts():
    assert lookup(Table([entry(), entry(config=NARROW)]), 1000) == NARROW


@pytest.mark.parametrize(
    ("tuned_m", "m", "found"),
    [
        # 128 x 128 tiles of [m, 768] on 132 multiprocessors: six in a band of 128 tokens, 22 bands are one wave
        (2700, 2816, True),
        (2700, 2817, False),
        (2817, 2816, False),
        (200, 282, True),  # one wave, 1.41 times
        (200, 284, False),  # one wave, 1.42 times
        (284, 200, False),
        # nine waves and eleven: the last one is a small part
        (25344, 30000, True),
        (30000, 25344, True),
        # seven waves and eight: not yet
        (19712, 19713, False),
    ],
)
def test_a_near_m_is_served_where_it_makes_the_same_waves(tuned_m, m, found):
    assert lookup(Table([entry(tuned_m)]), m) == (CONFIG if found else None)


def test_waves_of_grad_input_run_over_input_features():
    # 44 tiles in a band of 64 tokens: three bands are one wave, four are two
    layer = GRAD_INPUT._replace(k=44 * 128)
    table = Table([entry(192, layer, Config(64, 64, 128, 8, 3))])
    assert lookup(table, 190, layer) == Config(64, 64, 128, 8, 3)
    assert lookup(table, 193, layer) is None


def test_where_the_heuristic_won_it_chooses_for_near_sizes_too():
    table = Table([entry(1000), entry(1010, config=None)])
    assert lookup(table, 1010) is None
    assert lookup(table, 1009) is None
    assert lookup(table, 1004) == CONFIG


def test_splits_over_the_depth_stay_in_the_workspace():
    config = replace(NARROW, splits=3)
    table = Table([entry(197, config=config)])
    # 3 * 4 * m * 768 bytes of 1.9 MB: up to 206 tokens; 64 x 64 tiles make two waves for both
    assert lookup(table, 206) == config
    assert lookup(table, 207) is None


def test_grad_scales_keeps_the_number_of_splits():
    table = Table([entry(12608, GRAD_SCALES, Config(64, 128, 128, 8, 3), split_tokens=1600)])
    assert lookup(table, 12608, GRAD_SCALES) == (Config(64, 128, 128, 8, 3), 1600)
    # 188 steps of 64 tokens over eight splits: 24 steps each
    assert lookup(table, 12000, GRAD_SCALES) == (Config(64, 128, 128, 8, 3), 1536)
    few = Table([entry(512, GRAD_SCALES, Config(64, 128, 128, 8, 3), split_tokens=64)])
    # nine steps over eight splits: two each leave three without work
    assert lookup(few, 576, GRAD_SCALES) is None


def test_what_does_not_fit_in_shared_memory_is_not_used():
    # three stages in flight of 64 * (128 + 128) * 2 bytes
    assert lookup(Table([entry()]), 1000, device=replace(DEVICE, shared_memory=98304)) == CONFIG
    assert lookup(Table([entry()]), 1000, device=replace(DEVICE, shared_memory=98303)) is None


def test_an_operand_in_registers_is_not_for_a_compiler_that_is_not_trusted():
    layer = GRAD_SCALES._replace(kind="tf32", x_size=4, weight_size=4)
    wide, narrow = Config(32, 64, 64, 4, 3), Config(32, 32, 64, 4, 3)
    for config, trusted in ((wide, True), (wide, False), (narrow, False)):
        table = Table([entry(1024, layer, config, split_tokens=512)])
        found = lookup(table, 1024, layer, replace(DEVICE, keeps_operands=trusted))
        assert found == ((config, 512) if trusted or config is narrow else None)


@pytest.fixture
def table_file(tmp_path, monkeypatch):
    """A file with one entry for a made-up GPU, which is the one that is here."""
    path = tmp_path / "tuned.json"
    store.add(path, [entry()])
    monkeypatch.setenv("RLRR_TUNED_FILE", str(path))
    monkeypatch.delenv("RLRR_TUNED", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU)
    monkeypatch.setattr(configs, "cuda_device", lambda index: DEVICE)
    tuned.reload()
    yield path
    tuned.reload()


def test_find_reads_the_file_once(table_file, monkeypatch):
    reads = []
    monkeypatch.setattr(tuned, "read", lambda path: reads.append(path) or tuned_file.read(path))
    assert [tuned.find(*QUERY) for _ in range(3)] == [CONFIG] * 3
    assert tuned.find("forward", 10, *QUERY[2:]) is None
    assert reads == [table_file]
    table_file.unlink()
    assert tuned.find(*QUERY) == CONFIG
    assert tuned.find("forward", 1001, *QUERY[2:]) == CONFIG


def test_find_has_nothing_without_a_gpu(table_file):
    assert tuned.find(*QUERY[:-1], None) is None


def test_the_off_switch(table_file, monkeypatch):
    monkeypatch.setenv("RLRR_TUNED", "0")
    assert tuned.find(*QUERY) is None
    monkeypatch.setenv("RLRR_TUNED", "1")
    tuned.reload()
    assert tuned.find(*QUERY) == CONFIG


BROKEN = {
    "cut off": (lambda text: text[:-20], "not JSON"),
    "empty": (lambda text: "", "not JSON"),
    "not text": (lambda text: "\udcff", "not JSON"),
    "deep": (lambda text: "[" * 100000, "not JSON"),
    "a list": (lambda text: "[]", "expected {"),
    "of another format": (lambda text: text.replace('"format": 1', '"format": 2'), "format: expected 1, got 2"),
    "with a bad entry": (lambda text: text.replace('"num_warps": 8', '"num_warps": 7'), "entry 0: config.num_warps: 7"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_file_costs_one_warning_and_nothing_else(table_file, how):
    change, words = BROKEN[how]
    table_file.write_text(change(table_file.read_text()), errors="surrogateescape")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tuned.find(*QUERY) is None
        assert tuned.find("forward", 1001, *QUERY[2:]) is None
    assert len(caught) == 1
    assert f"{table_file}: {words}" in str(caught[0].message)


def test_even_where_warnings_are_errors_it_raises_nothing(table_file, capsys):
    table_file.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.find(*QUERY) is None
    assert str(table_file) in capsys.readouterr().err


def test_a_bad_entry_leaves_the_good_ones(table_file):
    content = json.loads(table_file.read_text())
    content["entries"] += [5, {**content["entries"][0], "m": -1}]
    table_file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"entry 1: expected an object, got 5 \(and 1 more\)"):
        assert tuned.find(*QUERY) == CONFIG


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_waited_for(table_file, kind):
    table_file.unlink()
    if kind == "folder":
        table_file.mkdir()
    else:
        os.mkfifo(table_file)
    with pytest.warns(UserWarning, match="expected a file"):
        assert tuned.find(*QUERY) is None


def test_a_file_that_was_named_and_is_not_there_is_said(table_file):
    table_file.unlink()
    with pytest.warns(UserWarning, match="there is no such file, though RLRR_TUNED_FILE names it"):
        assert tuned.find(*QUERY) is None


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
    assert not tuned.load()


def test_no_file_is_no_warning(monkeypatch, tmp_path):
    monkeypatch.delenv("RLRR_TUNED_FILE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tuned.load()


def test_reading_imports_no_tuner():
    code = (
        "import sys, rlrr_kernels.backends.triton; sys.exit(any((name + '.').startswith('rlrr_kernels.tune.') "
        "for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
