"""A small file of real digits, and one run on it that all tests of commands share."""

import json

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rlrr_kernels.finetune.__main__ import main

#: Options of every run: quick, on the CPU, without TensorBoard.
QUICK = ["--epochs", "2", "--warmup-epochs", "0", "--batch-size", "16", "--device", "cpu", "--no-tensorboard"]


def status(*words):
    """Run ``rlrr-finetune`` and return its exit status."""
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def digits():
    images, labels = load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), labels


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """An .npz file: 60 images to train and validate, 40 to test."""
    images, labels = digits()
    path = tmp_path_factory.mktemp("some data") / "digits.npz"
    np.savez(
        path, train_images=images[:60], train_labels=labels[:60], test_images=images[60:100], test_labels=labels[60:100]
    )
    return path


@pytest.fixture(scope="session")
def tuned(data, tmp_path_factory):
    """The folder of a finished RLRR run."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    assert status("--data", data, "--out", folder, *QUICK) == 0
    return folder


@pytest.fixture
def vtab(tmp_path):
    """KITTI's layout in VTAB-1k, with digits 0 to 3 for its four classes."""
    images, labels = digits()
    folder = tmp_path / "vtab 1k" / "kitti"
    (folder / "some images").mkdir(parents=True)
    lines = []
    for number in np.flatnonzero(labels < 4)[:40]:
        Image.fromarray(images[number]).save(folder / "some images" / f"{number}.png")
        lines.append(f"some images/{number}.png {labels[number]}\n")
    for name, part in (("train800", lines[:24]), ("val200", lines[24:32]), ("test", lines[32:])):
        (folder / f"{name}.txt").write_text("".join(part))
    (folder / "train800val200.txt").write_text("".join(lines[:32]))
    return folder.parent


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())
