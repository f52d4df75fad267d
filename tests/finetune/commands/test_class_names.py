"""Names of classes: kept with a run, matched at ``eval``, printed, merged and exported."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open

from rlrr_kernels import save_adapter
from rlrr_kernels.checkpoint.manifest import Manifest
from rlrr_kernels.finetune.settings import Settings
from tests.finetune.commands.conftest import QUICK, metrics_of, status
from tests.finetune.data.folders import write_classes


def write_folder(root, test):
    """Write class folders with these numbers of test images, and two training images each."""
    write_classes(root / "train", dict.fromkeys(test, 2))
    write_classes(root / "test", test)
    return root


@pytest.fixture(scope="module")
def always_horse(tmp_path_factory):
    """Makes an adapter of three classes that answers its label 0 to every image."""

    def make(name, class_names):
        model = timm.create_model(Settings.model, pretrained=True, num_classes=3).requires_grad_(False)
        model.head.requires_grad_(True)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.copy_(torch.tensor([2.0, 0.0, 0.0]))
        folder = tmp_path_factory.mktemp("adapters") / name
        save_adapter(model, folder, class_names=class_names)
        return folder

    return make


@pytest.fixture(scope="module")
def named(always_horse):
    """Its labels are not in alphabetical order, as in many datasets."""
    return always_horse("named", ["horse", "cat", "dog"])


def evaluated(capsys, *words):
    """(accuracy, loss, rows by class, whole output)."""
    capsys.readouterr()
    assert status("eval", *words, "--per-class", "--device", "cpu") == 0
    out = capsys.readouterr().out
    rows = [tuple(cell.strip() for cell in line.split("│")[1:4]) for line in out.splitlines() if line.startswith("│")]
    accuracy, loss = map(float, re.search(r"accuracy (\S+), loss (\S+),", out).groups())
    return accuracy, loss, rows, out


def test_a_run_keeps_the_names_of_its_folders(tmp_path, capsys):
    images = write_folder(tmp_path / "images", {"a cat": 2, "dog": 3})
    assert status("--data", images, "--method", "linear", "--out", tmp_path / "run", *QUICK) == 0
    assert metrics_of(tmp_path / "run")["class_names"] == ["a cat", "dog"]
    assert Manifest.read(tmp_path / "run" / "adapter").class_names == ("a cat", "dog")
    accuracy, _, rows, out = evaluated(capsys, tmp_path / "run")
    assert accuracy == round(metrics_of(tmp_path / "run")["test_accuracy"], 4)
    assert [(row[0], row[2]) for row in rows] == [("a cat", "2"), ("dog", "3")]
    assert "by their number" not in out
    # the same images in renamed folders, in reverse order: matched by label, each answer would be wrong
    write_folder(tmp_path / "renamed", {"1 dog": 3, "2 cat": 2})
    assert status("eval", tmp_path / "run", "--data", tmp_path / "renamed") == 2
    error = capsys.readouterr().err
    assert "has 2 of 2 classes that the run does not know (1 dog, 2 cat); expected some of its 2 (a cat, dog)" in error


def test_classes_are_matched_by_name_whatever_their_order(named, tmp_path, capsys):
    images = write_folder(tmp_path / "images", {"cat": 1, "dog": 2, "horse": 5})
    accuracy, loss, rows, out = evaluated(capsys, named, "--data", images)
    assert accuracy == 0.625
    losses = -torch.log_softmax(torch.tensor([2.0, 0.0, 0.0]), 0)
    assert loss == pytest.approx(((5 * losses[0] + 3 * losses[1]) / 8).item(), abs=5e-5)
    assert rows == [("horse", "100.0", "5"), ("cat", "0.0", "1"), ("dog", "0.0", "2")]
    assert "by their number" not in out
    assert "an answer may be" not in out


def test_some_of_the_classes_will_do_and_it_is_said(named, tmp_path, capsys):
    images = write_folder(tmp_path / "images", {"dog": 1, "horse": 3})
    accuracy, _, rows, out = evaluated(capsys, named, "--data", images)
    assert accuracy == 0.75
    assert rows == [("horse", "100.0", "3"), ("dog", "0.0", "1")]
    assert "2 of the run's 3 classes are in the data (dog, horse); an answer may be any of the run's" in out


def test_a_class_that_the_run_does_not_know_is_refused(named, tmp_path, capsys):
    images = write_folder(tmp_path / "images", {"cat": 1, "dog": 1, "zebra": 1})
    assert status("eval", named, "--data", images) == 2
    error = capsys.readouterr().err
    assert "has 1 of 3 classes that the run does not know (zebra); expected some of its 3 (horse, cat, dog)" in error


def test_where_one_has_no_names_labels_are_taken_as_they_are(named, always_horse, tmp_path, capsys):
    """Arrays with labels, and adapters without names."""
    labels = np.array([0, 0, 0, 1, 2])
    arrays = {
        f"{split}_{what}": values
        for split in ("train", "test")
        for what, values in (("images", np.zeros((5, 8, 8), np.uint8)), ("labels", labels))
    }
    np.savez(tmp_path / "images.npz", **arrays)
    accuracy, _, rows, out = evaluated(capsys, named, "--data", tmp_path / "images.npz")
    assert (accuracy, rows[0]) == (0.6, ("horse", "100.0", "3"))
    said = "classes are matched by their number: the run or the data has no names that tell them apart"
    assert said in out
    before = always_horse("before", None)
    accuracy, _, rows, out = evaluated(capsys, before, "--data", tmp_path / "images.npz")
    assert (accuracy, rows[0]) == (0.6, ("0", "100.0", "3"))
    assert said not in out
    images = write_folder(tmp_path / "images", {"cat": 1, "dog": 2, "horse": 5})
    accuracy, _, rows, out = evaluated(capsys, before, "--data", images)
    assert (accuracy, rows[0]) == (0.125, ("cat", "100.0", "1"))
    assert said in out
    two = write_folder(tmp_path / "two", {"cat": 1, "dog": 1})
    assert status("eval", before, "--data", two) == 2
    assert "has 2 classes, the head 3" in capsys.readouterr().err


def test_names_that_are_there_twice_tell_no_classes_apart(always_horse, tmp_path, capsys):
    images = write_folder(tmp_path / "images", {"a": 1, "b": 2, "crane": 1})
    accuracy, _, rows, out = evaluated(capsys, always_horse("cranes", ["crane", "crane", "a"]), "--data", images)
    assert (accuracy, rows[0]) == (0.25, ("crane", "100.0", "1"))
    assert "classes are matched by their number" in out


def test_merged_weights_have_the_names_as_timm_calls_them(named, tuned, tmp_path):
    for run in (named, tuned):
        assert status("merge", run, "--out", tmp_path / f"{run.name}.safetensors") == 0
    with safe_open(tmp_path / "named.safetensors", "pt") as file:
        assert json.loads(file.metadata()["label_names"]) == ["horse", "cat", "dog"]
    with safe_open(tmp_path / f"{tuned.name}.safetensors", "pt") as file:
        assert "label_names" not in file.metadata()
