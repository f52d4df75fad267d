"""``rlrr-finetune train``: recipes, options that replace them, and resuming."""

import shutil
from unittest import mock

import pytest
import torch

from rlrr_kernels.finetune.settings import Settings, describe_settings, settings_from
from tests.finetune.commands.conftest import QUICK, metrics_of, status
from tests.finetune.data.folders import write_classes


def test_a_recipe_fills_what_was_not_given(tmp_path):
    settings = settings_from({"task": "vtab/kitti", "data_root": tmp_path, "epochs": 20, "flip": False})
    assert (settings.lr, settings.drop_path, settings.weight_decay) == (3e-3, 0.3, 5e-2)
    assert (settings.epochs, settings.flip) == (20, False)
    assert settings.model == "vit_base_patch16_224.orig_in21k"
    assert settings.resolved_protocol == "final"


def test_without_a_task_the_defaults_hold():
    assert settings_from({"lr": 0.5}) == Settings(lr=0.5)


def test_a_given_value_that_equals_the_default_still_beats_the_recipe(tmp_path):
    """0 is the default drop path; a comparison with defaults would choose the recipe's 0.3."""
    given = {"task": "vtab/kitti", "data_root": tmp_path, "drop_path": Settings.drop_path}
    assert settings_from(given).drop_path == 0.0


def test_what_is_said_of_a_recipe_names_both_values():
    lines = describe_settings({"task": "vtab/kitti", "lr": 0.5, "weight_decay": 5e-2})
    assert lines[0].startswith("recipe of vtab/kitti: model vit_base_patch16_224.orig_in21k, ")
    assert "weight_decay 0.05" in lines[0]
    assert "lr 0.5" not in lines[0]
    assert lines[1:] == ["given instead: lr 0.5 (recipe: 0.003)"]
    assert describe_settings({"lr": 0.5}) == []


def test_a_task_starts_from_a_head_of_zeros_and_drops_elements_as_the_published_scripts_do_but_for_swin(tmp_path):
    given = {"task": "fgvc/cub", "data_root": tmp_path}
    settings = settings_from(given)
    assert (settings.head_init, settings.drop_path_kind) == ("zero", "element")
    assert "head_init zero, drop_path_kind element" in describe_settings(given)[0]
    own = settings_from({**given, "drop_path_kind": "image"})
    assert (own.head_init, own.drop_path_kind) == ("zero", "image")
    swin = settings_from({**given, "model": "swin_base_patch4_window7_224.ms_in22k"})
    assert (swin.head_init, swin.drop_path_kind) == ("random", "image")


@pytest.mark.parametrize(
    ("given", "warmup", "said"),
    [
        ({"epochs": 1}, 0, ["warm-up: 0 epochs, not the usual 2, as the run has 1"]),
        ({"epochs": 2}, 0, ["warm-up: 0 epochs, not the usual 2, as the run has 2"]),
        ({"epochs": 3}, 2, []),
        ({"epochs": 10, "task": "fgvc/cars"}, 2, ["warm-up: 2 epochs, not the usual 10, as the run has 10"]),
        ({"epochs": 11, "task": "fgvc/cars"}, 10, []),
        ({"epochs": 1, "warmup_epochs": 0}, 0, []),
    ],
)
def test_a_warm_up_that_nobody_asked_for_fits_the_epochs_and_says_so(tmp_path, given, warmup, said):
    assert settings_from({**given, "data_root": tmp_path}).warmup_epochs == warmup
    lines = describe_settings(given)
    assert [line for line in lines if line.startswith("warm-up")] == said
    assert not any("warmup_epochs" in line for line in lines if said)


@pytest.mark.parametrize("task", ["fgvc/cub", "fgvc-aug/cub", "vtab/kitti"])
def test_any_number_of_epochs_fits_every_recipe(tmp_path, task):
    for epochs in (1, 7, 13):
        assert settings_from({"task": task, "data_root": tmp_path, "epochs": epochs}).epochs == epochs


def test_a_task_runs_by_its_recipe_and_tests_once_after_the_last_epoch(vtab, tmp_path, capsys):
    words = ["--task", "vtab/kitti", "--data-root", vtab, "--model", Settings.model, "--out", tmp_path / "run"]
    assert status(*words, *QUICK, "--cooldown-epochs", "0") == 0
    out = capsys.readouterr().out
    assert "recipe of vtab/kitti: " in out
    assert "given instead: model vit_embedded_patch7_28 (recipe: vit_base_patch16_224.orig_in21k), " in out
    metrics = metrics_of(tmp_path / "run")
    assert metrics["images"] == {"trainval": 32, "test": 8}
    assert (metrics["settings"]["head_init"], metrics["settings"]["drop_path_kind"]) == ("zero", "element")
    assert metrics["settings"]["lr"] == 3e-3
    assert metrics["settings"]["epochs"] == 2
    assert f"last epoch, test accuracy {metrics['test_accuracy']:.4f}" in out


@pytest.mark.parametrize("after", [0, 5])
def test_resume_alone_goes_on_with_the_run_s_own_settings(data, tmp_path, capsys, after):
    """Stopped in the first epoch, and in the second."""
    folder, steps, step = tmp_path / "a run", iter(range(100)), torch.optim.AdamW.step

    def interrupt(self, *args, **kwargs):
        if next(steps) == after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", interrupt):
        assert status("--data", data, "--lr", "0.003", "--out", folder, *QUICK) == 130
    assert f"rlrr-finetune --resume '{folder}' goes on" in capsys.readouterr().err
    assert status("--resume", folder) == 0
    assert status("--data", data, "--lr", "0.003", "--out", tmp_path / "whole", *QUICK) == 0
    resumed, whole = metrics_of(folder), metrics_of(tmp_path / "whole")
    assert resumed["test_loss"] == whole["test_loss"]
    assert resumed["settings"]["lr"] == 0.003


def test_resume_into_an_empty_folder_takes_the_given_options(data, tmp_path):
    """The folder has no settings, so they must be given."""
    (tmp_path / "run").mkdir()
    assert status("--resume", tmp_path / "run", "--data", data, "--lr", "0.004", *QUICK) == 0
    assert metrics_of(tmp_path / "run")["settings"]["lr"] == 0.004


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """The working folder, with a folder of images and an interrupted run on them by a relative path."""
    home = tmp_path / "home"
    for split, grey in (("train", 10), ("test", 200)):
        write_classes(home / "some pets" / split, {"cat": 8, "hen": 8}, grey=grey)
    monkeypatch.chdir(home)
    with mock.patch.object(torch.optim.AdamW, "step", side_effect=KeyboardInterrupt):
        assert status("--data", "some pets", "--out", "run", "--method", "linear", *QUICK) == 130
    return home


def test_a_run_says_what_images_it_found(pets, capsys):
    assert status("--resume", "run") == 0
    out = capsys.readouterr().out
    assert out.startswith("images: train 13, val 3, test 16\n2 classes: cat, hen\nnote: the val images were set aside")
    assert "some pets-vit_embedded" not in out


def test_a_relative_path_is_found_again_from_another_folder(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status("--resume", pets / "run") == 0
    assert metrics_of(pets / "run")["settings"]["data"] == str(pets / "some pets")
    assert status("eval", pets / "run", "--split", "val") == 0
    assert "some pets, val: accuracy" in capsys.readouterr().out


def test_images_that_were_moved_are_given_by_their_new_place(pets, tmp_path, capsys):
    (pets / "some pets").rename(tmp_path / "moved")
    assert status("--resume", "run") == 2
    assert f"data: {pets}/some pets does not exist" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "moved", other)
    (other / "train" / "cat" / "image 0.png").rename(other / "train" / "cat" / "image 9.png")
    assert status("--resume", "run", "--data", other) == 2
    assert f"data: expected the images of the run, got others in {other}: other names" in capsys.readouterr().err
    assert status("--resume", "run", "--data", "../moved") == 0
    assert metrics_of(pets / "run")["settings"]["data"] == str(tmp_path / "moved")
    # the validation images must be those of the run
    shutil.rmtree(tmp_path / "moved" / "train" / "hen")
    shutil.rmtree(tmp_path / "moved" / "test" / "hen")
    write_classes(tmp_path / "moved" / "train", {"hen": 9}, grey=10)
    write_classes(tmp_path / "moved" / "test", {"hen": 1}, grey=10)
    assert status("eval", pets / "run", "--split", "val") == 2
    assert "data: expected the images of the run" in capsys.readouterr().err


def test_the_data_of_a_task_s_run_is_not_to_be_replaced(vtab, tmp_path, capsys):
    words = ["--task", "vtab/kitti", "--data-root", vtab, "--model", Settings.model, "--out", tmp_path / "run"]
    with mock.patch.object(torch.optim.AdamW, "step", side_effect=KeyboardInterrupt):
        status(*words, *QUICK, "--cooldown-epochs", "0", "--method", "linear")
    assert status("--resume", tmp_path / "run", "--data", vtab) == 2
    assert "data: expected 'digits', as in the run to resume" in capsys.readouterr().err
