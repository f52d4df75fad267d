"""The trainer: its schedule, steps, random draws, evaluation and moving average."""

import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from tqdm import tqdm

from rlrr_kernels.finetune import Settings
from rlrr_kernels.finetune.evaluation import logits_of
from rlrr_kernels.finetune.trainer import Average, Trainer
from tests.finetune.runs import prepared


def trainer(tmp_path, **changes):
    ready = prepared(tmp_path, **changes)
    return Trainer(ready.settings, ready.model, ready.splits, ready.device)


def epoch(runner):
    return runner.train_epoch(tqdm(disable=True))


def rates(runner, steps):
    found = []
    for step in range(steps):
        runner.scheduler.step_update(step)
        found.append(runner.optimizer.param_groups[0]["lr"])
    return found


def test_the_rate_rises_in_the_second_warm_up_epoch(tmp_path):
    """The published code runs two epochs at the first rate."""
    found = rates(trainer(tmp_path, epochs=6, warmup_epochs=3), 9)
    assert found == pytest.approx([1e-7 + (5e-3 - 1e-7) * step / 9 for step in range(9)])


def test_the_cosine_restarts_and_cools_down(tmp_path):
    found = rates(trainer(tmp_path, epochs=4, warmup_epochs=0, restart_epochs=2, cooldown_epochs=2, lr=1.0), 18)
    assert found[0] == found[6] == 1.0
    assert found[3] == found[9] == pytest.approx(0.5)
    assert found[5] < 0.1
    assert found[12:] == [1e-8] * 6


def test_restarts_that_grow_are_cut_off_at_the_end(tmp_path):
    """Cycles of 1, 2 and 4 epochs in 6 epochs of 3 steps: the last ends three quarters of its way down."""
    options = {"epochs": 6, "warmup_epochs": 0, "restart_epochs": 1, "restart_factor": 2, "lr": 1.0, "min_lr": 0.0}
    found = rates(trainer(tmp_path, **options), 18)
    assert [step for step, rate in enumerate(found) if rate == 1.0] == [0, 3, 9]
    assert found[6] == pytest.approx(0.5)
    assert found[15] == pytest.approx(0.5)
    assert found[17] == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 12)))


def test_equal_cycles_are_cut_off_at_the_end_too(tmp_path):
    """As ``fgvc/cub`` with fewer epochs: cycles of 2 epochs of 3 steps, in 3 epochs and in 1."""
    options = {"warmup_epochs": 0, "restart_epochs": 2, "lr": 1.0, "min_lr": 0.0}
    found = rates(trainer(tmp_path, epochs=3, **options), 9)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert found == pytest.approx([*cosine, *cosine[:3]])
    assert rates(trainer(tmp_path, epochs=1, **options), 3) == pytest.approx(cosine[:3])


@pytest.mark.slow
def test_compiled_steps_are_those_of_eager_also_with_a_short_last_batch(tmp_path, monkeypatch):
    """89 images in batches of 32, 32 and 25; the compiler runs what it traced as it is."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(inputs)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode, **o: compile_(model, backend=counted, **o))
    options = {"sizes": (89, 8, 8), "lr": 1e-3, "warmup_epochs": 0, "batch_size": 32, "drop_path": 0.0}
    eager, compiled = trainer(tmp_path, **options), trainer(tmp_path, **options, compile="default")
    for _ in range(2):
        one, other = epoch(eager), epoch(compiled)
        assert other["train_loss"] == one["train_loss"]
    assert len(graphs) == 2
    assert compiled.evaluate(compiled.splits.test) == eager.evaluate(eager.splits.test)
    assert len(graphs) == 2  # evaluation stays eager


@pytest.mark.slow
def test_a_compiled_step_on_a_cpu_drops_what_an_eager_one_drops(tmp_path):
    options = {"sizes": (8, 8, 8), "warmup_epochs": 0, "drop_path": 0.5, "drop_path_kind": "element", "device": "cpu"}
    eager, compiled = (epoch(trainer(tmp_path, **options, compile=mode)) for mode in ("", "default"))
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-4)


def test_a_cuda_graph_keeps_no_gradients_of_another_batch():
    with pytest.raises(ValueError, match=r"^compile: .* grad_accumulation=2.* got 'reduce-overhead'"):
        Settings(compile="reduce-overhead", grad_accumulation=2)


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path):
    """89 images: the last step has 25, in batches of 8, 8, 8 and 1."""
    whole, parts = (
        trainer(tmp_path, sizes=(89, 8, 8), lr=1e-3, warmup_epochs=0, batch_size=size, grad_accumulation=count)
        for size, count in ((32, 1), (8, 4))
    )
    for _ in range(2):
        one, other = epoch(whole), epoch(parts)
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert other["train_accuracy"] == one["train_accuracy"]
    assert whole.step == parts.step == 6
    for name, value in whole.trained().items():
        # a constant on all keys changes no attention: its gradient is rounding alone, which AdamW makes large
        if not name.endswith("qkv.shift"):
            torch.testing.assert_close(parts.trained()[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_the_loss_is_smoothed_cross_entropy_over_all_images(tmp_path):
    runner = trainer(tmp_path, lr=0.0, warmup_epochs=0, min_lr=0.0, label_smoothing=0.3)
    images, labels = (torch.stack(part) for part in zip(*((x, torch.tensor(y)) for x, y in runner.images), strict=True))
    with torch.no_grad():
        logits = runner.model(images)
    found = epoch(runner)
    assert found["train_loss"] == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.3).item(), rel=1e-5)
    assert found["train_accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_mixed_labels_train(tmp_path):
    runner = trainer(tmp_path, sizes=(31, 8, 8), batch_size=7, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    losses = [epoch(runner)["train_loss"] for _ in range(3)]
    assert 1.0 < losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["image", "element"])
def test_drop_path_draws_by_seed_and_epoch_not_by_what_ran_before(tmp_path, kind):
    def losses(disturb):
        runner = trainer(tmp_path, sizes=(48, 8, 8), drop_path=0.5, drop_path_kind=kind)
        found = []
        for _ in range(2):
            if disturb:
                torch.rand(100)
            found.append(epoch(runner)["train_loss"])
        return found

    plain = losses(False)
    assert losses(True) == plain
    assert trainer(tmp_path, sizes=(48, 8, 8)).settings.drop_path == 0
    assert epoch(trainer(tmp_path, sizes=(48, 8, 8)))["train_loss"] != plain[0]


def test_evaluation_counts_each_image_once_and_draws_nothing(tmp_path):
    runner = trainer(tmp_path, drop_path=0.9, batch_size=16)
    first = runner.evaluate(runner.splits.test)
    assert runner.evaluate(runner.splits.test) == first
    images, labels = zip(*runner.splits.test, strict=True)
    with torch.no_grad():
        logits = runner.model.eval()(torch.stack(images))
    assert first[0] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=1e-5)
    assert first[1] == (logits.argmax(1) == torch.tensor(labels)).double().mean().item()


class Slow(torch.utils.data.Dataset):
    """Takes a tenth of a second for each image."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        time.sleep(0.1)
        return self.items[index]


def test_the_progress_line_says_when_training_waits_for_images(tmp_path):
    runner, lines = trainer(tmp_path, sizes=(8, 2, 2), batch_size=4, workers=1, epochs=3), []
    bar = SimpleNamespace(update=lambda: None, set_postfix_str=lambda line, refresh: lines.append(line))
    runner.images.items = Slow(runner.images.items)
    runner.train_epoch(bar)
    share = re.search(r" images/s, (\d+)% of the time waiting for images$", lines[-1])
    assert 25 <= int(share[1]) <= 100
    runner.keep_images(None, quiet=True)
    runner.train_epoch(bar)
    assert lines[-1].endswith(" images/s")


def test_bf16_autocast_trains(tmp_path):
    runner = trainer(tmp_path, precision="bf16", warmup_epochs=0)
    assert logits_of(runner.model, runner.images[0][0][None], "bf16").dtype == torch.float32
    seen = []
    runner.model.blocks[0].mlp.act.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    first, second = (epoch(runner)["train_loss"] for _ in range(2))
    assert second < first < 3
    assert set(seen) == {torch.bfloat16}


def test_fp16_scales_the_loss_and_skips_a_step_that_overflows(tmp_path):
    runner = trainer(tmp_path, sizes=(4, 4, 4), batch_size=4, precision="fp16", warmup_epochs=0)
    before = runner.trained()
    runner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    epoch(runner)
    assert runner.scaler.get_scale() == 2.0**23  # too large for fp16's gradients
    assert all(torch.equal(value, before[name]) for name, value in runner.trained().items())
    runner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    epoch(runner)
    assert runner.scaler.get_scale() == 2.0**8
    assert not torch.equal(runner.trained()["head.weight"], before["head.weight"])


def test_it_is_the_exponential_average_from_the_first_values():
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average, expected = Average({"p": parameter}, 0.9), torch.tensor([1.0, 2.0])
    for value in (3.0, -1.0, 5.0):
        with torch.no_grad():
            parameter.fill_(value)
        average.update()
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(average.values["p"], expected)


def test_the_model_holds_it_inside_and_its_own_values_afterwards_even_after_an_error():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    average = Average({"p": parameter}, 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)
    average.update()

    def look():
        with average.in_place():
            assert parameter.item() == 2.0
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert parameter.item() == 3.0
    assert average.values["p"].item() == 2.0
