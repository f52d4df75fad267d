"""``rlrr-finetune sweep``: what is chosen, what is tested, and what an interruption costs."""

import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

from rlrr_kernels.finetune.__main__ import parser
from rlrr_kernels.finetune.commands import sweep
from rlrr_kernels.finetune.commands.common import CommandError, given_settings
from rlrr_kernels.finetune.commands.sweep_folder import Plan, Point, SweepFolder, published_grid
from rlrr_kernels.finetune.distributed import World
from rlrr_kernels.finetune.settings import Settings, settings_from
from tests.finetune.commands.conftest import QUICK, metrics_of, status

#: Two learning rates far apart, so that the choice is clear.
GRID = ["--lrs", "1e-6", "1e-2", "--weight-decays", "5e-5", "--method", "linear", "--warmup-lr", "1e-8", *QUICK]


def start(data, folder, *words):
    return status("sweep", "--data", data, "--out", folder, *GRID, *words)


def contents(folder):
    return json.loads((folder / "sweep.json").read_text())


def test_it_chooses_on_validation_and_tests_the_choice_once(data, tmp_path, capsys):
    folder = tmp_path / "a sweep"
    assert start(data, folder, "--seeds", "0", "3") == 0
    found = contents(folder)
    assert [(run["lr"], run["seed"]) for run in found["runs"]] == [(1e-6, 0), (1e-6, 3), (1e-2, 0), (1e-2, 3)]
    for run in found["runs"]:
        metrics = metrics_of(folder / run["folder"])
        assert metrics["protocol"] == "choose-epoch"
        assert "test_accuracy" not in metrics
        assert metrics["finished"] is True
        best = max(metrics["epochs"], key=lambda e: (e["val_accuracy"], -e["val_loss"]))
        assert (run["epoch"], run["val_accuracy"]) == (best["epoch"], best["val_accuracy"])
    assert found["best"] == {"lr": 1e-2, "weight_decay": 5e-5, "drop_path": 0.0}
    assert [run["seed"] for run in found["final"]] == [0, 3]
    for run in found["final"]:
        metrics = metrics_of(folder / run["folder"])
        assert (metrics["protocol"], metrics["settings"]["lr"]) == ("final", 1e-2)
        assert metrics["images"] == {"trainval": 60, "test": 40}
        assert run["test_accuracy"] == metrics["test_accuracy"]
    mean = sum(run["test_accuracy"] for run in found["final"]) / 2
    text = (folder / "sweep.md").read_text()
    assert f"| all | {100 * mean:.2f} ± " in text
    assert text.count("chosen |") == 1
    assert "chosen on validation images: lr 0.01" in capsys.readouterr().out


def test_a_run_of_the_grid_that_reaches_for_test_images_fails(data, tmp_path, capsys):
    """Even if the training loop ignored ``test=False``."""
    real = sweep.train
    with mock.patch.object(sweep, "train", lambda prepared, test: real(prepared, test=True, quiet=True)):
        assert start(data, tmp_path / "s") == 1
    assert "a sweep's runs do not see test images" in capsys.readouterr().err


def test_an_interrupted_sweep_goes_on_where_it_was(data, tmp_path, capsys):
    """Stopped in the second epoch of the second run: the first run is kept, the second resumed."""
    assert start(data, tmp_path / "whole") == 0
    steps, step, folder = iter(range(100)), torch.optim.AdamW.step, tmp_path / "s"

    def interrupt(self, *args, **kwargs):
        if next(steps) == 6 + 4:  # 48 images, 16 a step: 3 steps an epoch, 6 a run
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", interrupt):
        assert start(data, folder) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(contents(folder)["runs"]) == 1

    trained = []
    real = sweep.train
    with mock.patch.object(sweep, "train", lambda p, **k: trained.append(p.settings) or real(p, **k)):
        assert start(data, folder) == 0
    assert [(s.lr, s.resume is not None, s.resolved_protocol) for s in trained] == [
        (1e-2, True, "choose-epoch"),
        (1e-2, False, "final"),
    ]
    assert contents(folder) == contents(tmp_path / "whole")
    with mock.patch.object(sweep, "train", side_effect=AssertionError):
        assert start(data, folder) == 0


@pytest.mark.parametrize("left", ["nothing", "a note of its error"])
def test_a_run_that_ended_before_its_first_epoch_starts_anew(data, tmp_path, left):
    settings = Settings(data=str(data), method="linear", epochs=1, warmup_epochs=0, tensorboard=False)
    folder = tmp_path / "run"
    folder.mkdir()
    if left != "nothing":
        metrics = {
            "settings": settings.to_dict(),
            "protocol": "choose-epoch",
            "error": "RuntimeError: out of memory",
            "finished": False,
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
    metrics = sweep.one_run(folder, settings, World(), test=False)
    assert metrics["finished"] is True
    assert "error" not in metrics
    assert len(metrics["epochs"]) == 1


def test_a_run_folder_with_other_settings_is_refused_not_removed(tmp_path):
    settings = Settings(method="linear")
    (tmp_path / "metrics.json").write_text(
        json.dumps({"settings": settings.to_dict() | {"min_lr": 1e-5}, "protocol": "choose-epoch"})
    )
    with pytest.raises(CommandError, match=r"min_lr: expected 1e-05, as in the run in .*, got 1e-08"):
        sweep.one_run(tmp_path, settings, World(), test=False)
    assert (tmp_path / "metrics.json").exists()


def test_a_diverged_run_is_recorded_not_chosen_and_not_repeated(data, tmp_path):
    grid = ["--lrs", "1e30", "1e-3", "--weight-decays", "5e-5", "--method", "linear", *QUICK]
    words = ("sweep", "--data", data, "--out", tmp_path / "s", *grid)
    assert status(*words) == 0
    found = contents(tmp_path / "s")
    assert found["runs"][0]["error"].startswith("FloatingPointError: loss is")
    assert found["best"]["lr"] == 1e-3
    assert "| 1e+30 | 5e-05 | 0 | diverged |" in (tmp_path / "s" / "sweep.md").read_text()
    with mock.patch.object(sweep, "train", side_effect=AssertionError):
        assert status(*words) == 0


def test_more_values_keep_what_is_finished(data, tmp_path):
    assert start(data, tmp_path / "s", "--no-final") == 0
    assert contents(tmp_path / "s")["best"]["lr"] == 1e-2
    assert contents(tmp_path / "s")["final"] == []
    trained = []
    real = sweep.train
    with mock.patch.object(sweep, "train", lambda p, **k: trained.append(p.settings.lr) or real(p, **k)):
        assert start(data, tmp_path / "s", "--no-final", "--lrs", "1e-2", "3e-3") == 0
    assert trained == [3e-3]
    assert len(contents(tmp_path / "s")["runs"]) == 3
    assert [point["lr"] for point in contents(tmp_path / "s")["grid"]] == [1e-2, 3e-3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--epochs", "3"],
            "--epochs: .* holds a sweep with 2, got 3; --epochs 2 goes on with it, another --out",
        ),
        (["--head-init", "zero"], "--head-init: .* with 'random', got 'zero'; --head-init random goes on with it"),
        (["--drop-paths", "1"], "--drop-paths: expected 0 or more and less than 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data, tmp_path, capsys, words, message):
    arguments = parser("sweep").parse_args(["--data", str(data), *GRID])
    base = settings_from({**given_settings(arguments), "protocol": "choose-epoch"})
    SweepFolder.open(tmp_path / "s", Plan.of(base, [1e-3], [5e-5], [0.0], [0]))
    assert start(data, tmp_path / "s", *words) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_sweep_goes_on_from_another_folder_and_with_images_that_were_moved(data, tmp_path, capsys, monkeypatch):
    """Other images in their place are refused."""
    few = ["--lrs", "1e-2", "--no-final"]
    monkeypatch.chdir(data.parent)
    assert start(data.name, tmp_path / "s", *few) == 0
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    for place in (data, shutil.copy(data, tmp_path / "copy.npz")):
        assert start(place, tmp_path / "s", *few) == 0
        assert "already done" in capsys.readouterr().out
    arrays = dict(np.load(data))
    arrays["train_images"][3] += 1
    np.savez("copy.npz", **arrays)
    assert start("copy.npz", tmp_path / "s", *few) == 2
    assert f"data: expected the images of the run, got others in {tmp_path}/copy.npz" in capsys.readouterr().err


def test_a_folder_that_is_no_sweep_is_not_touched(data, tmp_path, capsys):
    (tmp_path / "mine").write_text("keep")
    assert start(data, tmp_path) == 2
    assert "exists, and is no sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_task_is_swept_by_its_recipe_and_chosen_on_val200(vtab, tmp_path, capsys):
    words = ["--task", "vtab/kitti", "--data-root", vtab, "--model", Settings.model, "--out", tmp_path / "s"]
    words += ["--lrs", "1e-2", "--early-stop", "2", "--cooldown-epochs", "0", *QUICK]
    assert status("sweep", *words, "--weight-decays", "5e-2") == 0
    found = contents(tmp_path / "s")
    assert found["best"] == {"lr": 1e-2, "weight_decay": 5e-2, "drop_path": 0.3}
    assert metrics_of(tmp_path / "s" / found["runs"][0]["folder"])["images"]["val"] == 8
    assert metrics_of(tmp_path / "s" / found["final"][0]["folder"])["images"] == {"trainval": 32, "test": 8}
    out = capsys.readouterr().out
    assert "recipe of vtab/kitti: " in out
    assert "drop_path 0.3" not in out


def test_the_default_grid_is_every_value_of_the_published_recipes():
    assert published_grid("vtab/kitti") == ([1e-3, 2e-3, 3e-3, 5e-3, 1e-2], [5e-5, 5e-2])
    assert published_grid("fgvc/cub") == ([1e-4, 5e-4, 3e-3], [5e-2])
    assert published_grid("") == published_grid("vtab/cifar")


def test_ties_are_broken_by_loss_and_the_mean_over_seeds_decides(tmp_path):
    plan = Plan.of(Settings(), [1e-3, 2e-3, 3e-3], [0.0], [0.0], [0, 1])
    record = SweepFolder.open(tmp_path / "s", plan)
    scores = {1e-3: ((0.9, 1.0), (0.5, 1.0)), 2e-3: ((0.7, 1.0), (0.75, 0.5)), 3e-3: ((0.75, 0.5), (0.7, 0.9))}
    for point in plan.points:
        for seed, (accuracy, loss) in enumerate(scores[point.lr]):
            epochs = [{"epoch": 1, "val_accuracy": accuracy, "val_loss": loss}]
            record.add_search(point, seed, {"epochs": epochs, "best_epoch": 1})
    assert record.best() == Point(3e-3, 0.0, 0.0)
    record.add_search(plan.points[2], 0, {"error": "FloatingPointError: loss is nan"})
    assert record.best() == Point(2e-3, 0.0, 0.0)
