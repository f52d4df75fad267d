"""The command line: its options, help and errors."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from rlrr_kernels.finetune import Settings
from rlrr_kernels.finetune.__main__ import COMMANDS, parser
from rlrr_kernels.finetune.commands.common import as_options
from tests.finetune.commands.conftest import status


def test_every_setting_is_an_option_and_only_given_ones_are_taken():
    shown = parser().format_help()
    for field in dataclasses.fields(Settings):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert vars(parser().parse_args([])) == {}
    given = parser().parse_args(["--method", "linear", "--lr", "0.01", "--no-pretrained", "--epochs", "3"])
    assert vars(given) == {"method": "linear", "lr": 0.01, "pretrained": False, "epochs": 3}


def test_help_says_every_default_and_every_command():
    shown = " ".join(parser().format_help().split())
    for text in ("(default: 0.01)", "(default: digits)", "mirror training images at random (default: off)"):
        assert text in shown
    for name in ("sweep", "eval", "merge", "export", "table"):
        assert f" {name} {COMMANDS[name].summary}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_of_its_own(capsys, name):
    assert status(name, "--help") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: rlrr-finetune" + (f" {name}" if name != "train" else ""))
    assert COMMANDS[name].description.splitlines()[0] in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "digitz"], "data: expected digits"),
        (["--lr", "-1"], "lr: expected a finite number"),
        (["--model", "vit_nonsense"], "timm does not know 'vit_nonsense'"),
        (["--method", "dora"], "invalid choice: 'dora'"),
        (["--data", "torch/cifar100"], "--data-root: expected a folder to keep torch/cifar100 in"),
        (["--device", "foo"], "device: 'foo' cannot be used"),
        (["--task", "vtab/cifar"], "--data-root: expected the folder that holds the images of vtab/cifar"),
        (["--task", "vtab/cifer", "--data-root", "."], "did you mean vtab/cifar?"),
        (["swep"], "unknown command 'swep'; did you mean sweep?"),
        (["eval", "nowhere"], "nowhere is no folder"),
        (["sweep", "--lr", "1e-3"], "unrecognized arguments: --lr"),
        (["--epochs=3", "--warmup-epochs", "5"], "--warmup-epochs: expected less than --epochs 3, got 5"),
        (["--early-stop", "1", "--protocol", "final"], "--early-stop: expected 0 with --protocol final, which uses"),
        (["sweep", "--lrs", "-1"], "--lrs: expected a finite number"),
        (["sweep", "--seeds", "1", "-1"], "--seeds: expected at least 0"),
        (["--resume", "lr=0.1"], "--resume: lr=0.1 is no folder"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(capsys, arguments, words):
    assert status(*arguments) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert words in last
    assert "error: " in last


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("patch_affine: ViT has none; set patch_affine=False", "--patch-affine: ViT has none; set --no-patch-affine"),
        ("norm: of a kind; with norm_affine=False it is left", "norm: of a kind; with --no-norm-affine it is left"),
        ("out: expected none with resume='a b', got c", "--out: expected none with --resume 'a b', got c"),
        ("a/lr=1/metrics.json: epochs=3 is wrong", "a/lr=1/metrics.json: epochs=3 is wrong"),
        ("data: b/lr=1: no epochs=3, groups=2", "--data: b/lr=1: no --epochs 3, groups=2"),
        ("loss is nan", "loss is nan"),
    ],
)
def test_errors_name_options_where_python_names_arguments(message, shown):
    assert as_options(message, parser(), ["--data", "b/lr=1"]) == shown


def test_a_failed_run_is_one_line_and_status_1(tmp_path, capsys):
    assert status("--out", tmp_path / "run", "--lr", "1e30", "--warmup-epochs", "0", "--no-tensorboard") == 1
    error = capsys.readouterr().err
    assert "error: loss is nan" in error
    assert "Traceback" not in error


def test_readers_of_runs_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert status("table", ".") == 2
    assert "error (process 1 of 2): table runs in one process, not in 2" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_and_says_where_things_are(tmp_path):
    command = [sys.executable, "-m", "rlrr_kernels.finetune", "--out", "run", "--method", "linear"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--epochs", "1", "--warmup-epochs", "0"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=1200,
    )
    out = done.stdout
    assert done.returncode == 0, done.stderr
    assert "trained 1,290 of" in out
    assert "best epoch 1, test accuracy 0." in out
    for name in ("adapter", "metrics.json", "curves.png"):
        assert os.path.join("run", name) in out
        assert (tmp_path / "run" / name).exists()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["command"].endswith("--warmup-epochs 0")
