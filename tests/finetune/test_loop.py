"""Runs on a tiny model and real digits: what trains, what is chosen, what is written."""

import dataclasses
import json
from unittest import mock

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from rlrr_kernels import load_adapter
from rlrr_kernels.checkpoint import adapter_metadata
from rlrr_kernels.finetune import Settings, loop, prepare, train
from rlrr_kernels.finetune.trainer import Average, Trainer
from tests.finetune.runs import prepared


@pytest.mark.usefixtures("curves")
def test_a_run_writes_its_three_files_and_says_everything(tmp_path):
    ready = prepared(tmp_path)
    metrics = train(ready, quiet=True)
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "curves.png", "metrics.json"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["settings"]["seed"] == 0
    assert {"python", "torch", "timm"} <= metrics["versions"].keys()
    assert metrics["command"]
    assert metrics["images"] == {"train": 96, "val": 40, "test": 50}
    assert [e["epoch"] for e in metrics["epochs"]] == [1, 2]
    assert 0 <= metrics["test_accuracy"] <= 1
    assert metrics["interrupted"] is False
    with Image.open(folder / "curves.png") as picture:
        assert picture.size[0] > 800
    assert adapter_metadata(folder / "adapter")["base_model"] == Settings.model


@pytest.mark.parametrize(("method", "trained"), [("rlrr", 21_642), ("linear", 1_290), ("full", None)])
def test_each_method_trains_what_it_says(tmp_path, method, trained):
    ready = prepared(tmp_path, method=method, epochs=1, warmup_epochs=0)
    before = {n: p.detach().clone() for n, p in ready.model.named_parameters()}
    metrics = train(ready, quiet=True)
    assert metrics["trainable_parameters"] == (trained or metrics["parameters"])
    changed = {n for n, p in ready.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in ready.model.named_parameters() if p.requires_grad}


def test_the_adapter_file_is_the_chosen_epoch_and_reproduces_the_test_figure(tmp_path):
    ready = prepared(tmp_path, epochs=3)
    metrics = train(ready, quiet=True)
    best = max(metrics["epochs"], key=lambda e: (e["val_accuracy"], -e["val_loss"]))
    assert metrics["best_epoch"] == best["epoch"]
    fresh = prepare(ready.settings)
    load_adapter(fresh.model, tmp_path / "run" / "adapter")
    trainer = Trainer(ready.settings, fresh.model, ready.splits, ready.device)
    assert trainer.evaluate(ready.splits.test) == (metrics["test_loss"], metrics["test_accuracy"])
    assert trainer.evaluate(ready.splits.val) == (best["val_loss"], best["val_accuracy"])


def test_an_earlier_best_epoch_is_kept(tmp_path):
    """Later, worse epochs do not replace the chosen one, in the file or in the test figure."""
    ready = prepared(tmp_path, epochs=3)
    scores = iter([(1.0, 0.5), (1.0, 0.9), (1.0, 0.7), (2.0, 0.6)])
    states = []

    def evaluate(self, images):
        states.append(self.trained())
        return next(scores)

    with mock.patch.object(Trainer, "evaluate", evaluate):
        metrics = train(ready, quiet=True)
    assert metrics["best_epoch"] == 2
    assert metrics["test_accuracy"] == 0.6
    chosen, tested = states[1], states[3]
    assert all(torch.equal(chosen[n], tested[n]) for n in chosen)
    assert not torch.equal(states[2]["head.weight"], tested["head.weight"])


def test_equal_seeds_give_equal_runs_and_other_seeds_others(tmp_path):
    runs = [
        train(prepared(tmp_path, (33, 8, 8), seed=seed, epochs=1, warmup_epochs=0, out=tmp_path / str(i)), quiet=True)
        for i, seed in enumerate((0, 0, 1))
    ]
    losses = [run["epochs"][0]["train_loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("after", [0, 4])
def test_ctrl_c_leaves_a_usable_adapter_and_says_so(tmp_path, after):
    """Before the first epoch ends, and in the second one."""
    ready = prepared(tmp_path)
    steps = iter(range(100))
    step = torch.optim.AdamW.step

    def interrupt(self, *args, **kwargs):
        if next(steps) == after:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with mock.patch.object(torch.optim.AdamW, "step", interrupt):
        metrics = train(ready, quiet=True)
    assert metrics["interrupted"] is True
    assert "test_accuracy" not in metrics
    assert len(metrics["epochs"]) == (0 if after == 0 else 1)
    epoch = adapter_metadata(tmp_path / "run" / "adapter")["epoch"]
    assert epoch == str(metrics.get("best_epoch", 0))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["interrupted"] is True
    fresh = prepare(ready.settings)
    load_adapter(fresh.model, tmp_path / "run" / "adapter")
    left = dict(ready.model.named_parameters())
    assert all(torch.equal(p, left[n]) for n, p in fresh.model.named_parameters())


def test_a_bypassed_layer_is_an_error_at_the_first_step(tmp_path):
    """As in models that read ``qkv.weight`` themselves: u, v and f would never train."""
    ready = prepared(tmp_path)
    layer = ready.model.blocks[0].attn.proj
    ready.model.blocks[0].attn.proj = Bypass(layer)
    with pytest.raises(RuntimeError, match=r"3 trained parameters get no gradient, blocks.0.attn.proj.layer.scale_out"):
        train(ready, quiet=True)


class Bypass(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.nn.functional.linear(x, self.layer.weight, self.layer.bias)


def test_ctrl_c_during_the_test_pass_is_no_result(tmp_path):
    ready = prepared(tmp_path, epochs=1, warmup_epochs=0)
    answers = iter([(1.0, 0.5)])

    def evaluate(self, images):
        for answer in answers:
            return answer
        raise KeyboardInterrupt

    with mock.patch.object(Trainer, "evaluate", evaluate):
        metrics = train(ready, quiet=True)
    assert metrics["interrupted"] is True
    assert "test_accuracy" not in metrics
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_recorded(tmp_path):
    ready = prepared(tmp_path)
    with torch.no_grad():
        ready.model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 3; try a smaller --lr"):
        train(ready, quiet=True)
    assert "loss is nan" in json.loads((tmp_path / "run" / "metrics.json").read_text())["error"]
    assert not (tmp_path / "run" / "adapter").exists()  # nothing good to keep yet


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match=r"out: .*run exists; a run never overwrites another"):
        train(prepared(tmp_path), quiet=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_final_trains_on_all_and_looks_at_the_test_images_once(tmp_path):
    ready = prepared(tmp_path, protocol="final")
    seen = []
    evaluate = Trainer.evaluate

    def look(self, images):
        seen.append(images)
        return evaluate(self, images)

    with mock.patch.object(Trainer, "evaluate", look):
        metrics = train(ready, quiet=True)
    assert seen == [ready.splits.test]
    assert metrics["images"] == {"trainval": 136, "test": 50}
    assert metrics["protocol"] == "final"
    assert metrics["best_epoch"] == 2
    assert not any(name.startswith("val") for epoch in metrics["epochs"] for name in epoch)
    # 136 images in batches of 32 are 5 steps, of which the last has 8 images
    assert Trainer(ready.settings, ready.model, ready.splits, ready.device).batches.steps == 5
    assert adapter_metadata(tmp_path / "run" / "adapter")["epoch"] == "2"


def test_best_on_test_reports_the_best_epoch_and_says_what_that_is(tmp_path, capsys):
    ready = prepared(tmp_path, epochs=3, protocol="best-on-test")
    with mock.patch.object(Trainer, "evaluate", side_effect=[(1.0, 0.5), (1.0, 0.9), (1.0, 0.7)]):
        metrics = train(ready)
    assert metrics["images"] == {"trainval": 136, "test": 50}
    assert metrics["best_epoch"] == 2
    assert metrics["test_accuracy"] == 0.9
    assert [e["test_accuracy"] for e in metrics["epochs"]] == [0.5, 0.9, 0.7]
    assert "chosen on the test images" in metrics["protocol_note"]
    assert metrics["protocol_note"] in capsys.readouterr().err
    assert "protocol_note" not in train(
        prepared(tmp_path, out=tmp_path / "other", epochs=1, warmup_epochs=0), quiet=True
    )


class Untouchable:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        raise AssertionError("a test image was read")


def test_without_a_test_no_test_image_is_read(tmp_path):
    ready = prepared(tmp_path)
    ready = dataclasses.replace(ready, splits=dataclasses.replace(ready.splits, test=Untouchable()))
    metrics = train(ready, quiet=True, test=False)
    assert metrics["finished"] is True
    assert "test_accuracy" not in metrics
    assert metrics["best_epoch"] in (1, 2)
    with pytest.raises(ValueError, match="test: expected True with protocol best-on-test"):
        train(prepared(tmp_path, protocol="best-on-test", out=tmp_path / "other"), quiet=True, test=False)
    assert not (tmp_path / "other").exists()


def test_early_stop_ends_a_run_that_gets_no_better(tmp_path):
    scores = [(1.0, 0.5), (1.0, 0.6), (1.0, 0.6), (1.1, 0.6), (2.0, 0.4)]
    with mock.patch.object(Trainer, "evaluate", side_effect=scores):
        metrics = train(prepared(tmp_path, epochs=9, early_stop=2, sizes=(8, 8, 8)), quiet=True)
    assert [e["epoch"] for e in metrics["epochs"]] == [1, 2, 3, 4]
    assert metrics["best_epoch"] == 2
    assert metrics["stopped_early"] is True
    assert metrics["test_accuracy"] == 0.4


def test_the_average_is_what_is_evaluated_saved_and_left_in_the_model(tmp_path):
    ready = prepared(tmp_path, ema=0.5, protocol="final", epochs=1, warmup_epochs=0)
    kept = []
    updates = Average.update

    def follow(self):
        updates(self)
        kept.append(
            ({n: v.clone() for n, v in self.values.items()}, {n: p.clone() for n, p in self.parameters.items()})
        )

    with mock.patch.object(Average, "update", follow):
        metrics = train(ready, quiet=True)
    assert len(kept) == 5  # a step each
    average, last = kept[-1]
    assert not torch.equal(average["head.weight"], last["head.weight"])
    model = dict(ready.model.named_parameters())
    assert all(torch.equal(model[name], value) for name, value in average.items())
    fresh = prepare(ready.settings)
    load_adapter(fresh.model, tmp_path / "run" / "adapter")
    assert torch.equal(fresh.model.head.weight, average["head.weight"])
    trainer = Trainer(ready.settings, fresh.model, ready.splits, ready.device)
    assert trainer.evaluate(ready.splits.test) == (metrics["test_loss"], metrics["test_accuracy"])


def test_tensorboard_gets_each_epoch(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = train(prepared(tmp_path, tensorboard=True, sizes=(32, 8, 8)), quiet=True)
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    points = [(e.step, e.value) for e in found.Scalars("val/accuracy")]
    assert points == [(e["epoch"], pytest.approx(e["val_accuracy"])) for e in metrics["epochs"]]
    assert {"train/loss", "lr", "images/per_second"} <= set(found.Tags()["scalars"])


def test_without_tensorboard_one_line_says_so(tmp_path, capsys):
    with mock.patch.dict("sys.modules", {"torch.utils.tensorboard": None}):
        train(prepared(tmp_path, tensorboard=True, sizes=(32, 8, 8)), quiet=True)
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path, gpu):
    metrics = train(prepared(tmp_path, device=gpu, precision="bf16"), quiet=True)
    assert metrics["epochs"][1]["train_loss"] < 2.5
    assert metrics["peak_memory_bytes"] > 0


@pytest.mark.parametrize(("resize", "expected"), [("squash", "bicubic"), ("crop", "bilinear")])
def test_images_are_resized_as_published(resize, expected):
    """VTAB uses the model's interpolation, FGVC the default of the published code's image library."""
    splits = loop.load_data(Settings(model="vit_tiny_patch16_224", resize=resize))
    for images in (splits.train, splits.test):
        (step,) = [each for each in images.transform.fixed.steps if isinstance(each, v2.Resize)]
        assert step.interpolation.value == expected
