"""Names that go to timm's dataset factory."""

import io
import itertools
import threading
import time

import numpy as np
import pytest
import torch
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
    # one image of each class; the labels come with the images
    assert {label for _, label in splits.val} == {0, 1}
    assert splits.classes == 2


class Reader:
    """Returns open files and labels as timm's readers do. The last image is damaged."""

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
    monkeypatch.setattr(named, "create_dataset", lambda *args, **options: ImageDataset("", reader=reader))
    reader = HubReader(label=[0, 1, 0, 1, 0])
    splits = load(data="hfds/owner/pets")
    assert splits.classes == 2
    assert [splits.test.items[i][0].getpixel((0, 0))[0] for i in range(4)] == [0, 1, 2, 3]
    assert [splits.test[i][1] for i in range(4)] == [0, 1, 0, 1]
    with pytest.raises(OSError, match=r"image /hub/image 4\.png cannot be read"):
        splits.test[4]
    # the same if labels are known only by reading the images
    reader = Reader()
    with pytest.raises(OSError, match=r"image /hub/image 4\.png cannot be read"):
        load(data="hfds/owner/pets")


def test_a_dataset_that_does_not_name_its_classes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(named, "create_dataset", lambda *args, **options: [(Image.new("L", (2, 2)), 0)] * 4)
    with pytest.raises(ValueError, match="data: 'torch/x' does not say how many classes it has"):
        load(data="torch/x", data_root=tmp_path)


def test_of_processes_that_share_a_root_one_downloads_at_a_time(tmp_path, monkeypatch):
    """Threads stand for the processes of torchrun: the lock treats them alike."""
    inside, most = [], []

    def create(name, split, **options):
        inside.append(split)
        most.append(len(inside))
        time.sleep(0.02)
        inside.remove(split)
        return Tiny(10)

    monkeypatch.setattr(named, "create_dataset", create)
    threads = [
        threading.Thread(target=load, kwargs={"data": "torch/cifar10", "data_root": tmp_path / "new" / "root"})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 6


def test_a_root_that_cannot_be_written_is_read_without_a_lock(tmp_path, monkeypatch):
    """The dataset may be on a read-only disk."""
    monkeypatch.setattr(named, "create_dataset", lambda *args, **options: Tiny(10))
    monkeypatch.setattr(named.os, "access", lambda path, mode: False)
    assert load(data="torch/cifar10", data_root=tmp_path).classes == 2
    assert list(tmp_path.iterdir()) == []


def test_folders_of_torchvision_show_16_bits_in_full_range(tmp_path):
    for split, name, value in itertools.product(("train", "test"), "ab", (10_000, 40_000)):
        (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(tmp_path / split / name / f"{value}.png")
    splits = load(data="torch/folder", data_root=tmp_path)
    assert splits.class_names == ("a", "b")
    assert [round(image.mean().item() * 127.5 + 127.5) for image, _ in splits.test] == [39, 156, 39, 156]


class Targets(Tiny):
    """Has labels without images, as torchvision's datasets do."""

    def __init__(self, targets):
        super().__init__(len(targets))
        self.targets = targets


class Columns(dict):
    """Columns by name, as in a dataset of the Hugging Face hub."""

    column_names = property(list)


class HubReader(Reader):
    label_key = "label"

    def __init__(self, **columns):
        self.dataset = Columns(columns)


def create_from(train, test):
    return lambda name, split, **options: {"train": train, "test": test}[split]


@pytest.mark.parametrize("wrong", [[-1] * 4, torch.tensor([0, 1, -1, -1]), [0, 1, None, 1], [0, 2, 1, 0]])
def test_a_label_out_of_range_is_found_before_training(tmp_path, monkeypatch, wrong):
    """An unlabelled test split has -1 everywhere, which would otherwise be found after all epochs."""
    first = next((i, x) for i, x in enumerate(list(map(int_or_none, wrong))) if x not in (0, 1))
    match = rf"data: 'torch/x', split test: image {first[0]} has label {first[1]}, expected 0 to 1"
    monkeypatch.setattr(named, "create_dataset", create_from(Targets([0, 1] * 5), Targets(wrong)))
    with pytest.raises(ValueError, match=match):
        load(data="torch/x", data_root=tmp_path)
    train, test = (ImageDataset("", reader=HubReader(image=[0] * 5, label=x)) for x in ([0, 1, 0, 1, 0], wrong))
    monkeypatch.setattr(named, "create_dataset", create_from(train, test))
    with pytest.raises(ValueError, match=match.replace("torch", "hfds")):
        load(data="hfds/x")
    # training labels are checked as well
    monkeypatch.setattr(named, "create_dataset", create_from(test, train))
    with pytest.raises(ValueError, match="split train: image"):
        load(data="hfds/x")


def int_or_none(label):
    return None if label is None else int(label)


def test_a_split_without_a_column_of_labels_is_named(monkeypatch):
    train, test = (ImageDataset("", reader=HubReader(**columns)) for columns in ({"label": [0] * 5}, {"image": []}))
    monkeypatch.setattr(named, "create_dataset", create_from(train, test))
    with pytest.raises(ValueError, match="data: 'hfds/x', split test: expected a column 'label', got image"):
        load(data="hfds/x")
