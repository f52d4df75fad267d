"""The command line as a user meets it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rlrr_kernels.finetune import Settings
from rlrr_kernels.finetune.cli import HELP, main, parser


def test_every_setting_is_an_option_with_the_same_default():
    given = vars(parser().parse_args([]))
    assert given == {f.name: f.default for f in dataclasses.fields(Settings)}
    assert HELP.keys() == given.keys()


def test_options_reach_the_settings():
    given = parser().parse_args(["--method", "linear", "--lr", "0.01", "--no-pretrained", "--flip", "--epochs", "3"])
    assert Settings(**vars(given)) == Settings(method="linear", lr=0.01, pretrained=False, flip=True, epochs=3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digitz"], "data: expected digits"),
        (["--lr", "-1"], "lr: expected a finite number"),
        (["--checkpoint", "none.pth"], "none.pth does not exist"),
        (["--model", "vit_nonsense"], "timm does not know 'vit_nonsense'"),
        (["--method", "lora"], "invalid choice: 'lora'"),
        (["--data", "torch/cifar100"], "data_root: expected a folder to keep torch/cifar100 in"),
        (["--device", "foo"], "device: 'foo' cannot be used"),
        (["--device", "cuda:99"], "device: 'cuda:99' cannot be used"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_an_existing_folder_is_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "never overwrites" in capsys.readouterr().err


def _start(tmp_path, *arguments):
    command = [sys.executable, "-m", "rlrr_kernels.finetune", "--out", str(tmp_path / "run"), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )


@pytest.mark.slow
def test_the_command_runs_and_says_where_things_are(tmp_path):
    process = _start(tmp_path, "--method", "linear", "--epochs", "1", "--warmup-epochs", "0")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "trained 1,290 of" in out
    assert "test accuracy 0." in out
    assert str(tmp_path / "run" / "curves.png") in out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["command"].endswith("--warmup-epochs 0")


@pytest.mark.slow
def test_a_real_ctrl_c_ends_with_130_and_a_usable_folder(tmp_path):
    process = _start(tmp_path, "--epochs", "200")
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "adapter.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted after" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["interrupted"] is True
