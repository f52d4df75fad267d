"""A run that was interrupted and resumed equals an uninterrupted one bit for bit."""

import dataclasses
import json
import os
import shutil
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from rlrr_kernels.finetune import Settings, prepare, train
from rlrr_kernels.finetune.__main__ import main
from rlrr_kernels.finetune.run_folder import STATE
from rlrr_kernels.finetune.saved_run import check_settings, read_state, settings_to_resume
from rlrr_kernels.finetune.trainer import Trainer
from tests.finetune.data.folders import write_classes
from tests.finetune.runs import prepared, results

EVERYTHING = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "ema": 0.8,
    "drop_path": 0.3,
    "flip": True,
    "batch_size": 7,
    "grad_accumulation": 2,
    "cooldown_epochs": 1,
    "sizes": (33, 20, 10),
}


AS_PUBLISHED = {"head_init": "zero", "drop_path_kind": "element"}


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def cut(at_step):
    """Interrupt a run after this number of steps, in the middle of an epoch."""
    update = Trainer._update

    def stop(self):
        if self.step == at_step:
            raise KeyboardInterrupt
        update(self)

    return mock.patch.object(Trainer, "_update", stop)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "at_step"),
    [
        (EVERYTHING | {"workers": 2}, 5),
        (EVERYTHING | AS_PUBLISHED | {"protocol": "final", "precision": "bf16", "sizes": (24, 9, 10)}, 4),
        ({"protocol": "best-on-test", "method": "full", "sizes": (20, 4, 8), "batch_size": 8}, 4),
        ({"precision": "fp16", "sizes": (4, 2, 2), "batch_size": 2, "method": "linear", "epochs": 4}, 5),
    ],
    ids=["everything", "final", "best-on-test", "fp16"],
)
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(tmp_path, changes, at_step):
    # the uninterrupted run decodes images in each epoch, the others keep them
    whole = prepared(tmp_path, out=tmp_path / "whole", **{**changes, "workers": 0, "cache": 0.0})
    expected = train(whole, quiet=True)
    out = tmp_path / "run"
    with cut(at_step):
        first = train(prepared(tmp_path, **changes), quiet=True)
    assert first["interrupted"] is True
    assert 1 <= len(first["epochs"]) < len(expected["epochs"])
    torch.manual_seed(12345)  # what the process drew before must not matter
    again = prepared(tmp_path, resume=out, **{**changes, "workers": 0})
    metrics = train(again, quiet=True)
    assert results(metrics) == results(expected)
    assert metrics["resumed_after"] == [len(first["epochs"])]
    assert same(adapter(out), adapter(tmp_path / "whole"))
    left = dict(again.model.named_parameters())
    assert all(torch.equal(p, left[n]) for n, p in whole.model.named_parameters())
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert not (out / "state").exists()


def test_a_run_cut_in_its_first_epoch_starts_that_epoch_again(tmp_path):
    options = {"sizes": (24, 8, 8), "batch_size": 12}
    expected = train(prepared(tmp_path, out=tmp_path / "whole", **options), quiet=True)
    with cut(1):
        assert train(prepared(tmp_path, **options), quiet=True)["epochs"] == []
    metrics = train(prepared(tmp_path, resume=tmp_path / "run", **options), quiet=True)
    assert results(metrics) == results(expected)
    assert same(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))


def test_an_earlier_best_epoch_outlives_the_interruption(tmp_path):
    """Also if the adapter folder is missing, or an epoch ahead of the state."""
    options = {"epochs": 3, "sizes": (24, 8, 8), "batch_size": 12, "method": "linear"}
    scores, tested = [(1.0, 0.9), (1.0, 0.5), (1.0, 0.6)], (2.0, 0.4)
    with mock.patch.object(Trainer, "evaluate", side_effect=[*scores, tested]):
        expected = train(prepared(tmp_path, out=tmp_path / "whole", **options), quiet=True)
    assert expected["best_epoch"] == 1
    with mock.patch.object(Trainer, "evaluate", side_effect=scores), cut(5):
        train(prepared(tmp_path, **options), quiet=True)
    shutil.rmtree(tmp_path / "run" / "adapter")
    again = prepared(tmp_path, resume=tmp_path / "run", **options)
    with mock.patch.object(Trainer, "evaluate", side_effect=[scores[2], tested]):
        assert results(train(again, quiet=True)) == results(expected)
    assert same(adapter(tmp_path / "run"), adapter(tmp_path / "whole"))
    assert torch.equal(again.model.head.weight, adapter(tmp_path / "whole")["head.weight"])


def test_killed_at_any_write_a_run_can_be_resumed(tmp_path):
    """Killed before the first, second, ... rename; after it nothing is written or removed."""
    options = {"sizes": (8, 8, 8), "batch_size": 8, "method": "linear"}
    expected = train(prepared(tmp_path, out=tmp_path / "whole", **options), quiet=True)
    out, survived, number, unborn = tmp_path / "run", False, 0, 0
    while not survived:
        shutil.rmtree(out, ignore_errors=True)
        survived = _killed_at(number, prepared(tmp_path, **options))
        number += 1
        if survived:
            break
        if not out.exists():
            unborn += 1
            continue
        if json.loads((out / "metrics.json").read_text()).get("finished"):
            continue
        assert settings_to_resume(out, {}).method == "linear"
        metrics = train(prepared(tmp_path, resume=out, **options), quiet=True)
        assert results(metrics) == results(expected), number
        assert same(adapter(out), adapter(tmp_path / "whole"))
        assert sorted(p.name for p in out.iterdir()) == ["adapter", "curves.png", "metrics.json"], number
    # state, metrics and the folder; adapter, state and metrics for each epoch; metrics, curves and metrics at the end
    assert number >= 3 + 2 * 3 + 3
    assert unborn == 3  # the folder is not there before it can be resumed from, and what was left is in nobody's way


def _killed_at(number, ready):
    """Run until the ``number``-th rename; returns whether the run finished before it."""
    count = iter(range(10_000))
    dead = False

    def dying(call, counts):
        def instead(*args, **kwargs):
            nonlocal dead
            if dead or (counts and next(count) == number):
                dead = True
                raise Killed
            return call(*args, **kwargs)

        return instead

    counted = [mock.patch.object(os, name, dying(getattr(os, name), True)) for name in ("replace", "rename")]
    others = [mock.patch.object(os, name, dying(getattr(os, name), False)) for name in ("unlink", "rmdir", "mkdir")]
    patches = [*counted, *others, mock.patch.object(shutil, "rmtree", dying(shutil.rmtree, False))]
    for patch in patches:
        patch.start()
    try:
        train(ready, quiet=True)
    except Killed:
        return False
    finally:
        for patch in patches:
            patch.stop()
    return True


def test_a_folder_without_a_name_given_is_there_with_its_state_or_not_at_all(tmp_path, monkeypatch):
    """Two runs that begin at once get different numbers, even if one takes a name that the other has just seen free."""
    monkeypatch.chdir(tmp_path)
    options = {"out": None, "sizes": (8, 8, 8), "method": "linear", "epochs": 1, "warmup_epochs": 0}
    name, rename, seen = f"runs/digits-{Settings.model}-linear-seed0", os.rename, []

    def late(source, target):
        seen.append(str(target))
        if len(seen) == 1:
            assert sorted(p.name for p in source.iterdir()) == ["metrics.json", "state"]
            target.mkdir()
            (target / "metrics.json").write_text("another run's")
        rename(source, target)

    with mock.patch.object(os, "rename", late):
        metrics = train(prepared(tmp_path, **options), quiet=True)
    assert seen[:2] == [name, f"{name}-2"]
    assert metrics["run"] == json.loads((tmp_path / f"{name}-2" / "metrics.json").read_text())["run"] == f"{name}-2"
    assert (tmp_path / name / "metrics.json").read_text() == "another run's"
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [name[5:], f"{name[5:]}-2"]


def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path):
    with mock.patch.object(os, "rename", side_effect=OSError("no space")), pytest.raises(OSError, match="no space"):
        train(prepared(tmp_path, sizes=(8, 8, 8), method="linear"), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_moved_says_where_it_is(tmp_path):
    options = {"sizes": (24, 8, 8), "batch_size": 12, "method": "linear"}
    with cut(3):
        assert train(prepared(tmp_path, **options), quiet=True)["run"] == str(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert train(prepared(tmp_path, resume=moved, **options), quiet=True)["run"] == str(moved)
    assert json.loads((moved / "metrics.json").read_text())["run"] == str(moved)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was interrupted after its first epoch. Tests must not change it."""
    folder = tmp_path_factory.mktemp("stopped")
    with cut(4):
        train(prepared(folder, method="linear"), quiet=True)
    return folder / "run"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 1e-3}, r"lr: expected 0.005, as in the run to resume, got 0.001"),
        ({"method": "rlrr"}, "method: expected 'linear'"),
    ],
)
def test_other_settings_are_refused_by_name(stopped, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path, resume=stopped, **{"method": "linear", **changes})


def test_other_images_are_refused(stopped, tmp_path):
    ready = prepared(tmp_path, sizes=(95, 40, 50), resume=stopped, method="linear")
    with pytest.raises(ValueError, match=r"images: expected .*96.* as in the run to resume, got .*95"):
        train(ready, quiet=True)


def test_another_number_of_processes_is_refused(stopped, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes: expected 1, as in the run to resume, got 2"):
        prepared(tmp_path, resume=stopped, method="linear")


def test_device_workers_and_tensorboard_may_differ(stopped, tmp_path):
    settings = settings_to_resume(stopped, {"workers": 1, "device": "cpu", "tensorboard": True})
    assert settings == Settings(
        method="linear", epochs=2, warmup_epochs=1, lr=5e-3, workers=1, device="cpu", resume=stopped
    )
    assert prepare(settings).state.record["epoch"] == 1
    with pytest.raises(ValueError, match=r"lr: expected 0.005"):
        prepare(settings_to_resume(stopped, {"lr": 0.5}))


def test_a_finished_run_says_so(tmp_path):
    train(prepared(tmp_path, method="linear", epochs=1, warmup_epochs=0, sizes=(8, 8, 8)), quiet=True)
    with pytest.raises(ValueError, match=r"resume: the run in .*run is finished, after 1 epochs"):
        read_state(tmp_path / "run")


def test_folders_and_files_that_are_no_state_are_refused(stopped, tmp_path):
    (tmp_path / "notes.txt").write_text("not a run")
    with pytest.raises(ValueError, match=r"resume: .* is no unfinished run: it has no state"):
        read_state(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"resume: .*none is no folder"):
        read_state(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"resume: expected the folder of an unfinished run, got .*empty, which is e"):
        settings_to_resume(tmp_path / "empty", {"workers": 1})
    whole = (stopped / STATE).read_bytes()
    (tmp_path / STATE).parent.mkdir()
    for damaged in (b"", whole[: len(whole) // 2], whole.replace(b"rlrr_kernels.state/1", b"rlrr_kernels.state/9")):
        (tmp_path / STATE).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"resume: .*last.safetensors cannot be read"):
            read_state(tmp_path)


@pytest.mark.parametrize("more", [[], ["--workers", "1", "--device", "cpu"]])
def test_the_command_begins_nothing_in_an_empty_folder_that_resume_alone_names(tmp_path, capsys, more):
    """It does not train the default model, as the name may be mistyped."""
    with pytest.raises(SystemExit) as end:
        main(["--resume", str(tmp_path), *more])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"resume: expected the folder of an unfinished run, got {tmp_path}, which is empty; to begin a run" in told
    assert list(tmp_path.iterdir()) == []


def test_a_state_of_other_parameters_is_refused_before_anything_is_copied(stopped, tmp_path):
    state = read_state(stopped)
    ready = prepared(tmp_path, method="linear")
    trainer = Trainer(ready.settings, ready.model, ready.splits, ready.device)
    before = trainer.trained()
    other = dataclasses.replace(state, tensors={k: t for k, t in state.tensors.items() if k != "trained/head.bias"})
    with pytest.raises(ValueError, match="resume: the state is of a model whose trained parameters"):
        trainer.load(other)
    assert same(trainer.trained(), before)


def test_a_setting_that_came_after_a_run_was_begun_has_had_its_default():
    older = {name: value for name, value in Settings(lr=0.5).to_dict().items() if name != "restart_factor"}
    check_settings(older, Settings(lr=0.5), "the run to resume")
    with pytest.raises(ValueError, match="restart_epochs: expected 0, as in the run to resume, got 5"):
        check_settings(older, Settings(lr=0.5, restart_epochs=5, restart_factor=2), "the run to resume")


def test_classes_of_other_names_are_refused(tmp_path):
    """Renamed folders give as many images and classes, in another order."""
    images = tmp_path / "images"
    for split in ("train", "test"):
        write_classes(images / split, {"cat": 5, "dog": 5})
    options = {"data": str(images), "sizes": (4, 2, 2), "batch_size": 4, "method": "linear"}
    with cut(1):
        train(prepared(tmp_path, **options), quiet=True)
    for split in ("train", "test"):
        (images / split / "cat").rename(images / split / "pet")
    with pytest.raises(ValueError, match=r"data: expected the images of the run, got others in .*: other names"):
        prepared(tmp_path, resume=tmp_path / "run", **options)
    for split in ("train", "test"):
        (images / split / "pet").rename(images / split / "cat")
    state = read_state(tmp_path / "run")
    state.record["metrics"]["class_names"] = ["cat"]
    other = tmp_path / "other"
    other.mkdir()
    state.write(other)
    with pytest.raises(ValueError, match="class_names: expected 2, one a class, got 1"):
        read_state(other)
