"""Runs on a tiny model and real digits: what trains, what is chosen, what is written."""

import dataclasses
import json
from unittest import mock

import pytest
import torch
from PIL import Image

from rlrr_kernels import load_adapter
from rlrr_kernels.checkpoint import adapter_metadata
from rlrr_kernels.finetune import Settings, loop, prepare, train
from rlrr_kernels.finetune.data import ImageSet, Splits


def shrink(splits: Splits) -> Splits:
    def first(images: ImageSet, count: int) -> ImageSet:
        return ImageSet(torch.utils.data.Subset(images.items, range(count)), images.transform, images.classes)

    return Splits(first(splits.train, 96), first(splits.val, 40), first(splits.test, 50), splits.classes)


def prepared(tmp_path, **changes):
    options = {"device": "cpu", "epochs": 2, "warmup_epochs": 1, "out": tmp_path / "run", "lr": 5e-3} | changes
    ready = prepare(Settings(**options))
    return dataclasses.replace(ready, splits=shrink(ready.splits))


def test_a_run_writes_its_three_files_and_says_everything(tmp_path):
    ready = prepared(tmp_path)
    metrics = train(ready, quiet=True)
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter.safetensors", "curves.png", "metrics.json"]
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
    assert adapter_metadata(folder / "adapter.safetensors")["base_model"] == Settings.model


@pytest.mark.parametrize(("method", "trained"), [("rlrr", 18_570), ("linear", 1_290), ("full", None)])
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
    load_adapter(fresh.model, tmp_path / "run" / "adapter.safetensors")
    trainer = loop.Trainer(ready.settings, fresh.model, ready.splits, ready.device)
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

    with mock.patch.object(loop.Trainer, "evaluate", evaluate):
        metrics = train(ready, quiet=True)
    assert metrics["best_epoch"] == 2
    assert metrics["test_accuracy"] == 0.6
    chosen, tested = states[1], states[3]
    assert all(torch.equal(chosen[n], tested[n]) for n in chosen)
    assert not torch.equal(states[2]["head.weight"], tested["head.weight"])


def test_equal_seeds_give_equal_runs_and_other_seeds_others(tmp_path):
    runs = [
        train(prepared(tmp_path, seed=seed, epochs=1, warmup_epochs=0, out=tmp_path / str(i)), quiet=True)
        for i, seed in enumerate((0, 0, 1))
    ]
    losses = [run["epochs"][0]["train_loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_the_schedule_warms_up_and_ends_low(tmp_path):
    ready = prepared(tmp_path, epochs=4, warmup_epochs=1)
    trainer = loop.Trainer(ready.settings, ready.model, ready.splits, ready.device)
    rates = []
    for step in range(12):
        trainer.scheduler.step_update(step)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-7)
    assert max(rates) == pytest.approx(5e-3, rel=0.2)
    assert rates.index(max(rates)) == 3
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 5e-4


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
    epoch = adapter_metadata(tmp_path / "run" / "adapter.safetensors")["epoch"]
    assert epoch == str(metrics.get("best_epoch", 0))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["interrupted"] is True
    fresh = prepare(ready.settings)
    load_adapter(fresh.model, tmp_path / "run" / "adapter.safetensors")
    left = dict(ready.model.named_parameters())
    assert all(torch.equal(p, left[n]) for n, p in fresh.model.named_parameters())


def test_metrics_and_adapter_are_there_after_each_epoch(tmp_path):
    """A run that is killed outright, by power or a scheduler, keeps what it had."""
    ready = prepared(tmp_path)
    seen = []
    train_epoch = loop.Trainer.train_epoch

    def look(self, bar):
        names = sorted(p.name for p in (tmp_path / "run").iterdir())
        path = tmp_path / "run" / "metrics.json"
        seen.append((names, len(json.loads(path.read_text())["epochs"]) if path.exists() else None))
        return train_epoch(self, bar)

    with mock.patch.object(loop.Trainer, "train_epoch", look):
        train(ready, quiet=True)
    assert seen == [([], None), (["adapter.safetensors", "metrics.json"], 1)]


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

    with mock.patch.object(loop.Trainer, "evaluate", evaluate):
        metrics = train(ready, quiet=True)
    assert metrics["interrupted"] is True
    assert "test_accuracy" not in metrics
    assert (tmp_path / "run" / "adapter.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_the_run_and_is_recorded(tmp_path):
    ready = prepared(tmp_path)
    with torch.no_grad():
        ready.model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 3; try a smaller --lr"):
        train(ready, quiet=True)
    assert "loss is nan" in json.loads((tmp_path / "run" / "metrics.json").read_text())["error"]
    assert not (tmp_path / "run" / "adapter.safetensors").exists()  # nothing good to keep yet


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("keep")
    with pytest.raises(FileExistsError, match=r"out: .*run exists; a run never overwrites another"):
        train(prepared(tmp_path), quiet=True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_without_out_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [
        train(prepared(tmp_path, out=None, epochs=1, warmup_epochs=0, method="linear"), quiet=True)["run"]
        for _ in range(2)
    ]
    name = f"digits-{Settings.model}-linear-seed0"
    assert folders == [f"runs/{name}", f"runs/{name}-2"]


def test_bf16_autocast_trains(tmp_path):
    metrics = train(prepared(tmp_path, precision="bf16", epochs=2), quiet=True)
    assert metrics["epochs"][1]["train_loss"] < 2.5


def test_a_checkpoint_file_replaces_the_pretrained_weights(tmp_path):
    from safetensors.torch import save_file

    donor = prepare(Settings(out=tmp_path / "x", method="full")).model
    state = {n: p.detach() + 0.125 for n, p in donor.state_dict().items()}
    state["head.weight"], state["head.bias"] = torch.zeros(7, 128), torch.zeros(7)  # another head
    save_file(state, tmp_path / "donor weights.safetensors")
    model = prepare(Settings(checkpoint=tmp_path / "donor weights.safetensors", method="full")).model
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
    assert model.head.weight.shape == (10, 128)


def test_a_checkpoint_that_does_not_fit_is_refused_not_half_loaded(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    state = {n: p.detach().clone() for n, p in prepare(Settings(method="full")).model.state_dict().items()}
    save_file({f"model.{n}": p for n, p in state.items()}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .* does not fit VisionTransformer: missing cls_token"):
        prepare(Settings(checkpoint=path))
    save_file({"nonsense": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"checkpoint: .*(unexpected nonsense|does not fit|cannot be read)"):
        prepare(Settings(checkpoint=path))
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot be read"):
        prepare(Settings(checkpoint=path))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"cls_token": Payload()}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"checkpoint: .* cannot be read"):
        prepare(Settings(checkpoint=tmp_path / "c.pth"))
    assert not (tmp_path / "executed").exists()


def test_batch_norm_is_refused():
    with pytest.raises(ValueError, match="has batch norm"):
        prepare(Settings(model="resnet10t", pretrained=False, method="linear"))


@pytest.mark.gpu
def test_a_run_on_the_gpu(tmp_path, gpu):
    metrics = train(prepared(tmp_path, device=gpu, precision="bf16"), quiet=True)
    assert metrics["epochs"][1]["train_loss"] < 2.5
    assert metrics["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"method": "lora"}, ValueError, "method: expected one of rlrr, linear, full, got 'lora'"),
        ({"precision": "fp8"}, ValueError, "precision: expected one of fp32, bf16"),
        ({"epochs": 0}, ValueError, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1"),
        ({"warmup_epochs": 20}, ValueError, "warmup_epochs: expected less than epochs = 20, got 20"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number"),
        ({"lr": float("nan")}, ValueError, "lr: expected a finite number"),
        ({"drop_path": 1.0}, ValueError, "drop_path: expected 0 or more and less than 1"),
    ],
)
def test_settings_check_themselves(changes, kind, words):
    with pytest.raises(kind, match=words):
        Settings(**changes)


def test_a_missing_checkpoint_and_an_unknown_model_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*none.pth does not exist"):
        Settings(checkpoint=tmp_path / "none.pth")
    with pytest.raises(ValueError, match="model: timm does not know 'vit_nonsense'"):
        prepare(Settings(model="vit_nonsense"))
