"""Names that go to timm's dataset factory."""

import io

import pytest
from PIL import Image
from timm.data import ImageDataset

from rlrr_kernels.finetune.data import named

from .folders import load


class Tiny:
    classes = ("x", "y")

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return Image.new("RGB", (4, 4)), i % 2


def test_torchvision_names_go_to_timms_factory(tmp_path, monkeypatch):
    calls = []

    def create(name, split, **options):
        calls.append((name, split, options["root"], options["download"]))
        return Tiny(10 if split == "train" else 4)

    monkeypatch.setattr(named, "create_dataset", create)
    splits = load(data="torch/cifar10", data_root=tmp_path)
    assert calls == [("torch/cifar10", s, str(tmp_path), True) for s in ("train", "test")]
    assert [len(s) for s in (splits.train, splits.val, splits.test, splits.trainval)] == [8, 2, 4, 10]
    assert splits.classes == 2


def test_a_torchvision_name_needs_a_root():
    with pytest.raises(ValueError, match="data_root: expected a folder to keep torch/cifar10 in, got none"):
        load(data="torch/cifar10")


class Reader:
    """As timm's readers: open files and labels. The last image is damaged."""

    class_to_idx = {"cat": 0, "dog": 1}  # noqa: RUF012

    def __len__(self):
        return 5

    def __getitem__(self, index):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (index, 0, 0)).save(file, "PNG")
        return io.BytesIO(file.getvalue()[: 40 if index == 4 else None]), index % 2

    def filename(self, index, basename=False, absolute=False):
        return f"/hub/image {index}.png" if absolute else None


def test_an_image_that_cannot_be_read_is_an_error_not_the_next_image(monkeypatch):
    """timm's own datasets return the next image and its label instead."""
    monkeypatch.setattr(named, "create_dataset", lambda *args, **options: ImageDataset("", reader=Reader()))
    splits = load(data="hfds/owner/pets")
    assert splits.classes == 2
    assert [splits.test.items[i][0].getpixel((0, 0))[0] for i in range(4)] == [0, 1, 2, 3]
    assert [splits.test[i][1] for i in range(4)] == [0, 1, 0, 1]
    with pytest.raises(OSError, match=r"image /hub/image 4\.png cannot be read"):
        splits.test[4]


def test_a_dataset_that_does_not_name_its_classes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(named, "create_dataset", lambda *args, **options: [(Image.new("L", (2, 2)), 0)] * 4)
    with pytest.raises(ValueError, match="data: 'torch/x' does not say how many classes it has"):
        load(data="torch/x", data_root=tmp_path)
