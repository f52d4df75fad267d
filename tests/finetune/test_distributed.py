"""Two processes on the CPU see, compute and write what one process with the doubled batch does."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rlrr_kernels import load_adapter
from rlrr_kernels.finetune import prepare, train
from rlrr_kernels.finetune.distributed import World, choose_device, on_main, total
from rlrr_kernels.finetune.trainer import Trainer
from tests.finetune.in_processes import EARLY, RESUMED, RUNS, SIZES
from tests.finetune.runs import first_is_best, prepared, results
from tests.once import once
from tests.torchrun import ROOT, launch


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All runs of ``in_processes.py``: (folder, what each process found, [status, output, errors] at the end)."""

    def start(folder):
        done = launch("tests.finetune.in_processes", str(folder), cwd=ROOT)
        (folder / "end.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))

    folder = once(tmp_path_factory, "finetune in two processes", start)
    end = json.loads((folder / "end.json").read_text())
    assert (folder / "found.json").exists(), end[2][-3000:]
    return folder, json.loads((folder / "found.json").read_text()), end


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same in one process with twice the batch: (metrics, adapter), without and with a moving average."""
    folder, answers = tmp_path_factory.mktemp("one process"), {}
    for ema in (0.0, 0.5):
        out = folder / str(ema)
        metrics = train(prepared(folder, SIZES, out=out, batch_size=32, ema=ema), quiet=True)
        answers[ema] = metrics, adapter(out)
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_compute_what_one_does_with_the_doubled_batch(two, one, name):
    folder, found, *_ = two
    expected, tensors = one[RUNS[name].get("ema", 0.0)]
    metrics = found[0][name]["whole"]
    assert results(metrics) == results(found[1][name]["whole"])
    assert metrics["processes"] == 2
    assert len(metrics["epochs"]) == 2
    for epoch, other in zip(metrics["epochs"], expected["epochs"], strict=True):
        for figure in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "lr"):
            assert epoch[figure] == pytest.approx(other[figure], rel=1e-5), figure
    assert metrics["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)
    assert metrics["test_accuracy"] == pytest.approx(expected["test_accuracy"])
    written = adapter(folder / name)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert written[key].shape == tensor.shape
        # a constant on all keys changes no attention: its gradient is rounding alone, which AdamW makes large
        if not key.endswith("qkv.shift"):
            torch.testing.assert_close(written[key], tensor, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.slow
def test_two_processes_share_what_each_decodes_a_half_of(two):
    _, found, *_ = two
    for rank in range(2):
        # the first image is read once more for its shape
        assert sorted(found[rank]["ddp"]["asked"]) == sorted([0, *range(rank, SIZES[0], 2)])
    first, second = (found[rank]["ddp"]["files"] for rank in range(2))
    # unlinked files of the training and the validation images
    assert len(first) == 2
    assert sorted(first) == sorted(second)
    assert all(name.endswith("(deleted)") for _, _, name in first)


@pytest.mark.slow
def test_sharded_parameters_are_never_stale_after_an_evaluation(two, tmp_path):
    """Training continues without the average, and the chosen epoch is tested and left in the model."""
    folder, found, *_ = two
    ready = prepared(tmp_path, SIZES, batch_size=32, **EARLY)
    with first_is_best():
        expected = train(ready, quiet=True)
    for rank in range(2):
        metrics = found[rank]["fsdp early"]["whole"]
        assert metrics["best_epoch"] == 1
        for epoch, other in zip(metrics["epochs"], expected["epochs"], strict=True):
            for figure in ("train_loss", "val_loss"):
                assert epoch[figure] == pytest.approx(other[figure], rel=1e-5), (figure, epoch["epoch"])
        assert metrics["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)
    fresh = prepare(ready.settings)
    load_adapter(fresh.model, folder / "fsdp early" / "adapter")
    loss, accuracy = Trainer(ready.settings, fresh.model, ready.splits, ready.device).evaluate(ready.splits.test)
    assert (loss, accuracy) == pytest.approx((metrics["test_loss"], metrics["test_accuracy"]), rel=1e-5)
    with torch.no_grad():
        logits = fresh.model(torch.stack([image for image, _ in ready.splits.test]))
    torch.testing.assert_close(torch.tensor(found[1]["fsdp early"]["logits"]), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_is_resumed_in_two_processes_bit_for_bit(two, name):
    folder, found, *_ = two
    assert found[0][name]["resumed"]["resumed_after"] == [1]
    assert results(found[0][name]["resumed"]) == results(found[0][name]["whole"])
    whole, resumed = adapter(folder / name), adapter(folder / f"{name} resumed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
def test_an_existing_folder_is_an_error_in_every_process(two):
    _, found, *_ = two
    for rank in range(2):
        assert "a run never overwrites another" in found[rank][f"exists {rank}"]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_of_them(two):
    """Within the time limit of ``launch``; gloo alone would make the other process wait for half an hour."""
    *_, (status, _, said) = two
    assert status != 0
    assert "this disk is broken" in said


@pytest.mark.slow
def test_the_command_speaks_once_for_all_processes(two):
    folder, _, (_, said, _) = two
    assert said.count("test accuracy 0.") == 1
    assert json.loads((folder / "command" / "metrics.json").read_text())["processes"] == 2


def test_one_gpu_named_for_several_processes_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device: expected cuda or auto with 2 processes, got 'cuda:1'"):
        choose_device("cuda:1")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="device: 'foo' cannot be used"):
        choose_device("foo")


def test_one_process_needs_no_group():
    assert on_main(World(), lambda: 3) == 3
    assert total(World(), torch.tensor(1.5), 2.0, device=torch.device("cpu")) == [1.5, 2.0]
