"""Settings refuse invalid values, and survive JSON."""

import json
import math
from pathlib import Path

import pytest

from rlrr_kernels.finetune import Settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "adapters"}, "method: expected one of rlrr, .*full, got 'adapters'"),
        ({"protocol": "best"}, "protocol: expected one of nothing, choose-epoch, final, best-on-test, got 'best'"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"cooldown_epochs": -1}, "cooldown_epochs: expected at least 0"),
        ({"warmup_epochs": 20}, "warmup_epochs: expected less than epochs=20, got 20"),
        ({"restart_epochs": 7, "cooldown_epochs": 2}, "restart_epochs: expected a divisor of epochs=20, .*, got 7"),
        ({"restart_epochs": 30, "cooldown_epochs": 2}, "restart_epochs: expected a divisor of epochs=20, .*, got 30"),
        ({"restart_factor": 2}, "restart_factor: expected 1 with restart_epochs=0 and cooldown_epochs=0: .*, got 2"),
        ({"restart_factor": 2, "restart_epochs": 2, "cooldown_epochs": 1}, "restart_factor: expected 1 with .*=2 and"),
        ({"lr": -1.0}, "lr: expected a finite number"),
        ({"lr": math.nan}, "lr: expected a finite number"),
        ({"mixup": math.inf}, "mixup: expected a finite number"),
        ({"drop_path": 1.0}, "drop_path: expected 0 or more and less than 1"),
        ({"ema": 1.0}, "ema: expected 0 or more and less than 1"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected 0 or more and less than 1"),
        ({"early_stop": 3, "protocol": "final"}, "early_stop: expected 0 with protocol='final'"),
        ({"early_stop": 3, "task": "vtab/cifar"}, "early_stop: expected 0 with protocol='final'"),
        ({"rank": 0}, "rank: expected 1 to 128, got 0"),
        ({"rank": 129}, "rank: expected 1 to 128, got 129"),
        ({"rank": 2, "method": "lora"}, "rank: expected 1 with method='lora', got 2"),
        ({"frozen_dtype": "bf16", "method": "full"}, "frozen_dtype: expected none with method='full', got 'bf16'"),
    ],
)
def test_settings_check_themselves(changes, words):
    with pytest.raises(ValueError, match=words):
        Settings(**changes)


def test_a_missing_file_or_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint: .*none.pth does not exist"):
        Settings(checkpoint=tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"resume: .*none is no folder"):
        Settings(resume=tmp_path / "none")
    with pytest.raises(ValueError, match="out: expected none with resume"):
        Settings(resume=tmp_path, out=tmp_path / "new")


def test_settings_come_back_from_json(tmp_path):
    settings = Settings(data_root=tmp_path / "with space", out=Path("runs/x"), lr=3e-3, flip=True, task="vtab/dtd")
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert Settings.from_dict({"epochs": 7}) == Settings(epochs=7)
    with pytest.raises(ValueError, match="settings: 'epoch' is no field"):
        Settings.from_dict({"epoch": 7})


def test_an_empty_protocol_is_choose_epoch_and_with_a_task_final():
    assert Settings().resolved_protocol == "choose-epoch"
    assert Settings(task="vtab/cifar").resolved_protocol == "final"
    assert Settings(task="vtab/cifar", protocol="best-on-test").resolved_protocol == "best-on-test"
