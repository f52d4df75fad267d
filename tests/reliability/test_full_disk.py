"""Full disks and folders that cannot be written: told before the work where that can be known, and nothing is lost."""

import errno
import json
import os
import shutil
from collections import namedtuple
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from rlrr_kernels import apply_rlrr, load_adapter, save_adapter
from rlrr_kernels.analysis import __main__ as analysis
from rlrr_kernels.backends import tuned
from rlrr_kernels.finetune import run_folder, train
from rlrr_kernels.finetune.run_folder import NotWritten
from rlrr_kernels.finetune.saved_run import read_state
from rlrr_kernels.finetune.trainer import Trainer
from rlrr_kernels.io import files
from rlrr_kernels.tune import __main__ as tune
from tests.finetune.commands.conftest import status
from tests.finetune.runs import prepared, results
from tests.reliability.hostile import tiny_vit
from tests.small_models import stir
from tests.tune.test_main import SIZES, machine

SMALL = {"sizes": (8, 8, 8), "batch_size": 8, "method": "linear"}
QUICK = ["--device", "cpu", "--epochs", "1", "--warmup-epochs", "0", "--method", "linear", "--no-tensorboard"]
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO]


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch):
    """Curves are drawn in test_loop.py; here they only take time."""
    monkeypatch.setattr(run_folder, "draw_curves", lambda metrics: b"a picture")


def full_from(number, code):
    """From the ``number``-th write or rename on, the disk takes nothing; before it, half of a file may still fit."""
    calls = iter(range(100_000))

    def failing(call, half):
        def instead(*arguments):
            if next(calls) < number:
                return call(*arguments)
            if half:
                # as much as fitted is in the file that has no name yet
                arguments[0].write_bytes(arguments[1][: len(arguments[1]) // 2])
            raise OSError(code, os.strerror(code))

        return instead

    stack = mock.patch.multiple(os, replace=failing(os.replace, False), rename=failing(os.rename, False))
    return stack, mock.patch.object(files, "_write", failing(files._write, True))


@pytest.mark.parametrize(
    "step", [pytest.param(1, id="each", marks=pytest.mark.slow), pytest.param(6, id="every sixth")]
)
def test_a_disk_that_fills_at_any_write_keeps_a_run_that_goes_on(tmp_path, step):
    expected = results(train(prepared(tmp_path, out=tmp_path / "whole", **SMALL), quiet=True))
    failed, out = 0, tmp_path / "run"
    for number in range(0, 100, step):
        shutil.rmtree(out, ignore_errors=True)
        ready = prepared(tmp_path, **SMALL)
        renames, writes = full_from(number, CODES[number % len(CODES)])
        try:
            with renames, writes:
                train(ready, quiet=True)
            break
        except OSError as error:
            failed, told = failed + 1, error
        assert os.strerror(CODES[number % len(CODES)]) in str(told)
        if not out.exists():
            # before the first epoch: nothing is left, and there is nothing to go on from
            assert sorted(p.name for p in tmp_path.iterdir()) == ["whole"]
            continue
        kept = read_state(out).record["epoch"]
        assert isinstance(told, NotWritten)
        assert f"the folder keeps the run as it was after epoch {kept}: when" in str(told)
        assert f"rlrr-finetune --resume {out} goes on from there" in str(told)
        assert not list(out.rglob(".*"))
        json.loads((out / "metrics.json").read_text())
        assert results(train(prepared(tmp_path, resume=out, **SMALL), quiet=True)) == expected, number
    # of two epochs: folder; adapter, state and metrics twice; metrics and curves at the end; each written and renamed
    assert failed >= 12 // step


def test_the_room_that_a_run_says_it_needs_is_what_it_takes(tmp_path, monkeypatch):
    """State and adapter, each beside the one that it replaces: not less, and not much more."""
    options = {"sizes": (8, 8, 8), "method": "rlrr", "ema": 0.5, "out": tmp_path / "run"}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 1000, 1000))
    with pytest.raises(
        OSError, match=r"^\[Errno 28\] out: a run needs (\S+ MiB) for its state and adapter: .* has 1000 b"
    ):
        prepared(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []
    wanted = []
    monkeypatch.setattr(run_folder, "check_writable", lambda folder, needed: wanted.append(needed))
    ready = prepared(tmp_path, **options)
    largest = 0

    def watching(write):
        def instead(path, data):
            nonlocal largest
            write(path, data)
            there = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
            largest = max(largest, there)

        return instead

    monkeypatch.setattr(files, "_write", watching(files._write))
    train(ready, quiet=True)
    assert largest <= wanted[0] <= 2 * largest + run_folder.OTHER_FILES


def test_merge_says_how_much_room_it_needs_before_it_merges(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    train(prepared(tmp_path, **SMALL), quiet=True)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**20, 2**20))
    assert status("merge", folder, "--out", tmp_path / "m.safetensors") == 2
    assert f"out: {tmp_path} has 1 MiB free, expected 3.9 MiB" in capsys.readouterr().err
    assert not (tmp_path / "m.safetensors").exists()


def nowhere(kind, tmp_path, monkeypatch):
    """A folder in which nothing can be made, root or not."""
    if kind == "proc":
        return "/proc/1"  # no permission bits say so
    write = files._write

    def refuse(path, data):
        if str(path).startswith(str(tmp_path / "full")):
            raise OSError(kind, os.strerror(kind))
        write(path, data)

    monkeypatch.setattr(files, "_write", refuse)
    (tmp_path / "full").mkdir()
    return str(tmp_path / "full")


@pytest.mark.parametrize("kind", ["proc", errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("command", ["train", "sweep", "merge", "export", "tune", "analyze", "save_adapter"])
def test_a_folder_that_cannot_be_written_is_one_error_before_any_work(tmp_path, monkeypatch, capsys, command, kind):
    run = tmp_path / "run"
    if command in ("merge", "export", "analyze"):
        save_adapter(stir(apply_rlrr(tiny_vit())), run / "adapter")
        (run / "metrics.json").write_text(json.dumps({"settings": {"model": "vit_tiny_patch16_224", "seed": 0}}))
    folder = nowhere(kind, tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    worked = mock.Mock(side_effect=AssertionError("work began"))
    monkeypatch.setattr(Trainer, "train_epoch", worked)
    monkeypatch.setattr("rlrr_kernels.finetune.commands.merge.merged", worked)
    monkeypatch.setattr(tune, "measure", worked)
    monkeypatch.setattr(analysis, "analyze", worked)
    if command == "save_adapter":
        with pytest.raises(OSError, match=f"{folder}/x.* cannot be written|{folder}/") as told:
            save_adapter(apply_rlrr(tiny_vit()), f"{folder}/x")
        said, ended = str(told.value), 2
    else:
        arguments = {
            "train": ["train", *QUICK, "--out", f"{folder}/x/run"],
            "sweep": ["sweep", *QUICK, "--out", f"{folder}/x/sweep"],
            "merge": ["merge", run, "--out", f"{folder}/x.safetensors"],
            "export": ["export", run, "--format", "torch", "--out", f"{folder}/x.pt2"],
        }
        if command == "tune":
            ended = _ended(tune.main, ["--shape", SIZES, "--dtype", "float32", "--out", f"{folder}/x.json"], machine())
        elif command == "analyze":
            monkeypatch.setattr(analysis, "base_weights", lambda *given: {})
            monkeypatch.setattr(analysis.sources, "rlrr_adapter", lambda *given: None)
            ended = _ended(analysis.main, ["x", "--rlrr", str(run), "--out", f"{folder}/x"])
        else:
            ended = status(*arguments[command])
        said = capsys.readouterr().err
    assert ended == 2, said
    assert folder in said
    assert len(said.strip().splitlines()) == 1
    if kind != "proc":
        assert os.strerror(kind) in said
    left = set(tmp_path.rglob("*")) - set(before)
    assert not [p for p in left if p.is_file() and p.name != ".x.json.lock"], left
    worked.assert_not_called()


def _ended(main, *arguments):
    try:
        return main(*arguments)
    except SystemExit as stop:
        return stop.code


def test_why_a_run_failed_is_said_though_the_disk_is_full_as_well(tmp_path):
    ready = prepared(tmp_path, lr=1e30, min_lr=1e30, warmup_epochs=0, **SMALL | {"sizes": (30, 8, 8)})
    write_metrics = run_folder._write_metrics

    def full(folder, metrics):
        if "error" in metrics:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_metrics(folder, metrics)

    with mock.patch.object(run_folder, "_write_metrics", full), pytest.raises(FloatingPointError, match="loss is"):
        train(ready, quiet=True)
    assert read_state(tmp_path / "run").record["epoch"] >= 0


@pytest.mark.parametrize("number", range(6))
def test_an_adapter_stays_as_it_was_where_the_disk_fills_while_it_is_replaced(tmp_path, number):
    folder, model = tmp_path / "adapter", stir(apply_rlrr(tiny_vit()))
    save_adapter(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    stir(model)
    renames, writes = full_from(number, errno.ENOSPC)
    # tensors and card are two files, each written and renamed: the first may be new while the second is old
    full = pytest.raises(OSError, match=f"{folder}/.* cannot be written: No space left on device")
    with renames, writes, full if number < 4 else nullcontext():
        save_adapter(model, folder, {"epoch": "2"})
    assert sorted(p.name for p in folder.iterdir()) == sorted(before)
    if number < 2:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    loaded = dict(load_adapter(tiny_vit(), folder).named_parameters())
    wanted = dict(model.named_parameters()) if number >= 2 else old
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted if wanted[name].requires_grad)


def test_tuning_shows_what_it_measured_where_the_table_cannot_be_written(tmp_path, monkeypatch, capsys):
    file, add, calls = tmp_path / "t.json", tuned.add, []

    def full(path, entries):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, f"{path} cannot be written: No space left on device")
        return add(path, entries)

    monkeypatch.setattr(tuned, "add", full)
    monkeypatch.setattr(tune, "failures", lambda device: ({}, {}))  # the check of the backends takes long
    arguments = ["--shape", SIZES, "--dtype", "float32", "--rounds", "2", "--out", str(file)]
    assert tune.main([*arguments, "--backend", "panels", "--backend", "reference"], machine()) == 1
    out, err = capsys.readouterr()
    assert f"2 of 3 measured, 1 entries into {file}" in out
    assert f"{file} cannot be written: No space left on device; what was stored before is kept" in err
    assert len(json.loads(file.read_text())["entries"]) == 1
