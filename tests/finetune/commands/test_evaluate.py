"""``rlrr-finetune eval``: the run's own result, and results on other images."""

import re
import shutil

import pytest
import torch
from PIL import Image

from rlrr_kernels import apply_rlrr, save_adapter
from rlrr_kernels.finetune.commands.evaluate import split_of
from rlrr_kernels.finetune.data import ImageSet, Transform
from rlrr_kernels.finetune.distributed import World
from rlrr_kernels.finetune.evaluation import evaluate
from rlrr_kernels.finetune.loop import load_data
from rlrr_kernels.finetune.settings import Settings
from tests.finetune.commands.conftest import QUICK, metrics_of, status


def figures(capsys):
    out = capsys.readouterr().out
    return [float(value) for value in re.search(r"accuracy (\S+), loss (\S+), ", out).groups()], out


@pytest.mark.parametrize("folder", [".", "adapter"])
def test_it_repeats_the_test_figure_of_the_run(tuned, capsys, folder):
    assert status("eval", tuned / folder) == 0
    (accuracy, loss), out = figures(capsys)
    metrics = metrics_of(tuned)
    assert accuracy == round(metrics["test_accuracy"], 4)
    assert loss == pytest.approx(metrics["test_loss"], abs=5e-5)
    assert "40 images" in out
    assert "the same accuracy as in metrics.json" in out


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "full", "ssf"))]
)
def test_it_repeats_the_figure_of_every_method(data, tmp_path, capsys, method):
    if method == "lora":
        pytest.importorskip("peft")
    assert status("--data", data, "--method", method, "--out", tmp_path / "run", *QUICK) == 0
    capsys.readouterr()
    assert status("eval", tmp_path / "run") == 0
    assert "the same accuracy as in metrics.json" in capsys.readouterr().out


def test_the_validation_split_gives_the_chosen_epoch_s_figure(tuned, capsys):
    assert status("eval", tuned, "--split", "val") == 0
    (accuracy, loss), out = figures(capsys)
    metrics = metrics_of(tuned)
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    assert accuracy == round(best["val_accuracy"], 4)
    assert loss == pytest.approx(best["val_loss"], abs=5e-5)
    assert "the epoch was chosen on these images" in out


@pytest.mark.parametrize("split", ["val", "train"])
def test_another_seed_s_split_is_not_to_be_had(tuned, capsys, split):
    """The run was trained on most of the validation images of another seed."""
    assert status("eval", tuned, "--split", split, "--seed", "3") == 2
    assert "--seed" in capsys.readouterr().err


def test_training_images_are_seen_without_augmentation(data, tmp_path, capsys):
    assert status("--data", data, "--out", tmp_path / "run", "--resize", "crop", "--flip", *QUICK) == 0
    seen = []
    for _ in range(2):
        capsys.readouterr()
        assert status("eval", tmp_path / "run", "--split", "train") == 0
        values, out = figures(capsys)
        seen.append(values)
        assert "the train images were trained on" in out
    assert seen[0] == seen[1]
    images = split_of(load_data(Settings(data=str(data), resize="crop", flip=True)), "train")
    assert torch.equal(images[0, 3][0], images[7, 3][0])


def test_an_adapter_from_elsewhere_needs_data_and_nothing_else(tuned, data, tmp_path, capsys):
    shutil.copytree(tuned / "adapter", tmp_path / "moved")
    assert status("eval", tmp_path / "moved") == 2
    assert "data: expected --data or --task" in capsys.readouterr().err
    assert status("eval", tmp_path / "moved", "--data", data) == 0
    (accuracy, _), out = figures(capsys)
    assert accuracy == round(metrics_of(tuned)["test_accuracy"], 4)
    assert "not known" not in out
    assert status("eval", tmp_path / "moved", "--data", data, "--split", "val") == 0
    assert "whether it was trained on these images is not known without its run" in capsys.readouterr().out


def test_a_figure_that_was_chosen_on_the_test_images_says_so_however_it_is_computed(data, tmp_path, capsys):
    assert status("--data", data, "--out", tmp_path / "run", "--protocol", "best-on-test", *QUICK) == 0
    for options in ([], ["--batch-size", "7"]):
        capsys.readouterr()
        assert status("eval", tmp_path / "run", *options) == 0
        assert "The epoch was chosen on the test images" in capsys.readouterr().out
    assert status("eval", tmp_path / "run", "--data", data) == 0
    assert "was chosen" not in capsys.readouterr().out


def test_an_adapter_that_was_saved_by_hand_is_loaded_as_it_was_configured(data, tmp_path, capsys):
    import timm

    model = timm.create_model(Settings.model, pretrained=True, num_classes=10)
    apply_rlrr(model, target_modules=["blocks.*.mlp.fc1"], norm_affine=False, patch_affine=False)
    save_adapter(model, tmp_path / "mine")
    assert status("eval", tmp_path / "mine", "--data", data) == 0


def test_per_class_accuracies_add_up(tuned, capsys):
    assert status("eval", tuned, "--per-class") == 0
    out = capsys.readouterr().out
    rows = [re.findall(r"[\d.]+", line) for line in out.splitlines() if re.match(r"\W*\d+ .*\d+\.\d", line)]
    assert [int(row[0]) for row in rows] == list(range(10))
    hits = sum(float(row[1]) / 100 * int(row[2]) for row in rows)
    assert sum(int(row[2]) for row in rows) == 40
    assert hits / 40 == pytest.approx(metrics_of(tuned)["test_accuracy"], abs=1e-3)


def test_counts_by_class_are_of_the_label_not_of_the_answer():
    """A model that always answers 1."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 2.0, 0.0]))
    items = [(Image.new("L", (1, 1)), label) for label in (0, 1, 1, 2)]
    images = ImageSet(items, Transform(lambda _: torch.zeros(1, 2, 2)), 3)
    result = evaluate(model, images, Settings(batch_size=3), torch.device("cpu"), World())
    assert result.hits.tolist() == [0, 2, 0]
    assert result.images.tolist() == [1, 2, 1]
    assert result.accuracy == 0.5
    losses = -torch.log_softmax(torch.tensor([0.0, 2.0, 0.0]), 0)
    assert result.loss == pytest.approx(((2 * losses[1] + 2 * losses[0]) / 4).item())


def test_a_run_without_an_adapter_and_a_folder_of_neither_are_refused(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text('{"settings": {"model": "m", "seed": 0}, "protocol": "final"}')
    assert status("eval", tmp_path) == 2
    assert "has no adapter folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert status("eval", tmp_path / "empty") == 2
    assert "neither a run nor an adapter" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text('{"settings": []}')
    (tmp_path / "adapter").mkdir()
    assert status("eval", tmp_path) == 2
    assert "metrics.json is not what a run writes" in capsys.readouterr().err
