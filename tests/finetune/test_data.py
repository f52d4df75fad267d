"""Datasets by name and by folder, their splits and their errors."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlrr_kernels.finetune.data import load_splits, make_transform, read_fashion_mnist

GREY = make_transform((1, 28, 28), (0.5,), (0.5,), "bilinear")
RGB = make_transform((3, 16, 24), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "bicubic")


def load(data, root=None, seed=0, transform=GREY):
    return load_splits(str(data), root, seed, transform, transform)


def write_images(root: Path, counts: dict[str, int], grey: int = 100):
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 10), (grey + label, 0, 0)).save(root / name / f"image {i}.png")


def test_digits_are_split_as_vtab_does_stratified_and_disjoint():
    splits = load("digits")
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [800, 200, 797]
    assert splits.classes == 10
    counts = np.bincount([splits.train.items[i][1] for i in range(800)], minlength=10)
    assert counts.min() >= 75
    assert counts.max() <= 85
    everything = sorted(
        (np.asarray(part.items[i][0]).tobytes(), part.items[i][1])
        for part in (splits.train, splits.val, splits.test)
        for i in range(len(part))
    )
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    assert everything == sorted((x.tobytes(), int(y)) for x, y in zip(pixels, labels, strict=True))


def test_the_seed_decides_the_digits_split():
    def first(seed):
        return [load("digits", seed=seed).train.items[i][1] for i in range(30)]

    assert first(0) == first(0) != first(1)


def test_the_transform_resizes_whole_images_and_normalises():
    image = Image.new("L", (8, 8), 255)
    out = GREY(image)
    assert out.shape == (1, 28, 28)
    assert out.dtype is torch.float32
    assert torch.allclose(out, torch.ones(1, 28, 28))
    assert RGB(image).shape == (3, 16, 24)
    assert torch.allclose(RGB(Image.new("L", (8, 8), 0)), torch.full((3, 16, 24), -2.0))


def test_flip_mirrors_half_the_images():
    flipping = make_transform((1, 4, 4), (0.5,), (0.5,), "bilinear", flip=True)
    pixels = np.zeros((4, 4), np.uint8)
    pixels[:, 0] = 255
    torch.manual_seed(0)
    left = sum(bool(flipping(Image.fromarray(pixels))[0, 0, 0] > 0) for _ in range(200))
    assert 70 < left < 130


def test_a_folder_with_three_splits_and_spaces_in_its_names(tmp_path):
    root = tmp_path / "my images"
    for split, counts in (("train", (3, 2)), ("val", (1, 1)), ("test", (2, 1))):
        write_images(root / split, dict(zip(("a cat", "the dog"), counts, strict=True)))
    splits = load(root, transform=RGB)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [5, 2, 3]
    assert [splits.train[i][1] for i in range(5)] == [0, 0, 0, 1, 1]
    assert splits.train[0][0].shape == (3, 16, 24)


@pytest.mark.parametrize("last", ["test", "val"])
def test_without_a_validation_folder_part_of_train_is_set_aside(tmp_path, last):
    write_images(tmp_path / "train", {"a": 10, "b": 10})
    write_images(tmp_path / last, {"a": 1, "b": 2})
    splits = load(tmp_path)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [16, 4, 3]
    assert not set(splits.train.items.indices) & set(splits.val.items.indices)


def test_classes_that_differ_between_splits_are_refused(tmp_path):
    """Labels counted per split would silently shift."""
    write_images(tmp_path / "train", {"a": 1, "b": 1, "c": 1})
    write_images(tmp_path / "test", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match=r"test has classes \['a', 'c'\].*train has \['a', 'b', 'c'\]"):
        load(tmp_path)


def test_a_folder_without_splits_names_what_it_expected(tmp_path):
    write_images(tmp_path / "train", {"a": 1})
    with pytest.raises(FileNotFoundError, match=r"expected folders train and test .*found train"):
        load(tmp_path)


def test_an_unknown_name_says_what_is_known():
    with pytest.raises(ValueError, match=r"data: expected digits, fashion-mnist, .* got 'digitz'"):
        load("digitz")


def test_an_unreadable_image_says_which(tmp_path):
    write_images(tmp_path / "train", {"a": 2, "b": 1})
    write_images(tmp_path / "test", {"a": 1, "b": 1})
    (tmp_path / "test" / "b" / "image 0.png").write_bytes(b"no picture")
    with pytest.raises(OSError, match="image 1 cannot be read"):
        load(tmp_path).test[1]


def _write_fashion(folder: Path, images: int = 50, labels: int | None = None):
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pixels = rng.integers(0, 256, images * 784, dtype=np.uint8).tobytes()
        answers = rng.integers(0, 10, labels or images, dtype=np.uint8).tobytes()
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0" * 16 + pixels))
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0" * 8 + answers))


def test_fashion_mnist_reads_the_original_files(tmp_path):
    _write_fashion(tmp_path)
    images, labels = read_fashion_mnist(tmp_path, "train")
    expected = np.random.default_rng(0).integers(0, 256, 50 * 784, dtype=np.uint8)
    assert torch.equal(images.flatten(), torch.from_numpy(expected))
    assert images.shape == (50, 1, 28, 28)
    assert labels.dtype is torch.int64
    splits = load("fashion-mnist", tmp_path)
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [40, 10, 50]


def test_fashion_mnist_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz is missing"):
        load("fashion-mnist", tmp_path)
    _write_fashion(tmp_path, labels=49)
    with pytest.raises(ValueError, match="50 images but 49 labels"):
        load("fashion-mnist", tmp_path)


def test_timm_names_go_to_timms_factory(tmp_path, monkeypatch):
    from rlrr_kernels.finetune import data

    class Tiny:
        classes = ("x", "y")

        def __init__(self, length):
            self.length = length

        def __len__(self):
            return self.length

        def __getitem__(self, i):
            return Image.new("RGB", (4, 4)), i % 2

    calls = []

    def create(name, split, **options):
        calls.append((name, split, options["root"], options["download"]))
        return Tiny(10 if split == "train" else 4)

    monkeypatch.setattr(data, "create_dataset", create)
    splits = load("torch/cifar10", tmp_path)
    assert calls == [("torch/cifar10", s, str(tmp_path), True) for s in ("train", "test")]
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [8, 2, 4]
    assert splits.classes == 2


def test_a_label_out_of_range_is_an_error():
    splits = load("digits")
    splits.train.items.labels = splits.train.items.labels + 5
    bad = int(np.argmax(splits.train.items.labels >= 10))
    with pytest.raises(ValueError, match="expected 0 to 9"):
        splits.train[bad]
