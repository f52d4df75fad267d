"""Digits, Fashion-MNIST and .npz slices."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from rlrr_kernels.finetune.data import read_fashion_mnist

from .folders import load


def test_digits_are_split_as_vtab_does_stratified_and_disjoint():
    splits = load(data="digits")
    assert [len(s) for s in (splits.train, splits.val, splits.test, splits.trainval)] == [800, 200, 797, 1000]
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


def test_every_seed_has_the_same_test_digits():
    """Otherwise a sweep would validate one seed on test images of another."""
    first, other = (load(data="digits", seed=seed).test.items for seed in (0, 3))
    assert all(first[i][1] == other[i][1] and first[i][0].tobytes() == other[i][0].tobytes() for i in range(797))


def test_the_seed_decides_which_digits_validate():
    def first(seed):
        return [load(data="digits", seed=seed).train.items[i][1] for i in range(30)]

    assert first(0) == first(0) != first(1)


def _write_fashion(folder: Path, images: int = 50, labels: int | None = None):
    rng = np.random.default_rng(0)
    for split in ("train", "t10k"):
        pixels = rng.integers(0, 256, images * 784, dtype=np.uint8).tobytes()
        answers = rng.integers(0, 10, labels or images, dtype=np.uint8).tobytes()
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">IIII", 2051, images, 28, 28) + pixels)
        )
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">II", 2049, len(answers)) + answers)
        )


def test_fashion_mnist_reads_the_original_files(tmp_path):
    _write_fashion(tmp_path)
    images, labels = read_fashion_mnist(tmp_path, "train")
    expected = np.random.default_rng(0).integers(0, 256, 50 * 784, dtype=np.uint8)
    assert torch.equal(images.flatten(), torch.from_numpy(expected))
    assert images.shape == (50, 1, 28, 28)
    assert labels.dtype is torch.int64
    splits = load(data="fashion-mnist", data_root=tmp_path)
    assert [len(s) for s in (splits.train, splits.val, splits.test, splits.trainval)] == [40, 10, 50, 50]
    labels = [[label for _, label in part] for part in (splits.trainval, splits.val)]
    for label in range(10):
        assert abs(labels[0].count(label) / 5 - labels[1].count(label)) < 1
    seen = sorted(np.asarray(splits.trainval.items[i][0]).tobytes() for i in range(50))
    assert seen == sorted(image.numpy().tobytes() for image in images)


def test_fashion_mnist_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.gz is missing"):
        load(data="fashion-mnist", data_root=tmp_path)
    _write_fashion(tmp_path, labels=49)
    with pytest.raises(ValueError, match="50 images but 49 labels"):
        load(data="fashion-mnist", data_root=tmp_path)


def _slice(shape=(5, 4), train=30, test=6, classes=3):
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
    }


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3)])
def test_an_npz_slice_is_split_by_class(tmp_path, shape):
    file, arrays = tmp_path / "my slice.npz", _slice(shape)
    np.savez(file, **arrays)
    splits = load(data=str(file))
    assert splits.classes == 3
    assert [len(s) for s in (splits.train, splits.val, splits.test, splits.trainval)] == [24, 6, 6, 30]
    assert sorted(splits.val[i][1] for i in range(6)) == [0, 0, 1, 1, 2, 2]
    seen = {(np.asarray(image).tobytes(), label) for image, label in (splits.trainval.items[i] for i in range(30))}
    pairs = zip(arrays["train_images"], arrays["train_labels"], strict=True)
    assert seen == {(image.tobytes(), int(label)) for image, label in pairs}
    test = np.stack([np.asarray(splits.test.items[i][0]) for i in range(6)])
    assert np.array_equal(test.reshape(6, *shape), arrays["test_images"])


def test_16_bit_arrays_are_scaled_to_their_full_range(tmp_path):
    arrays = _slice() | {"train_images": np.full((30, 5, 4, 3), 40_000, ">u2")}
    np.savez(tmp_path / "a.npz", **arrays)
    splits = load(data=str(tmp_path / "a.npz"))
    image = splits.train.items[0][0]
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (156, 156, 156))


def test_validation_images_of_an_npz_are_used_by_whatever_usual_name(tmp_path):
    """As in MedMNIST, whose labels are columns."""
    arrays = _slice()
    arrays |= {"valid_images": arrays["test_images"][:3] + 1, "valid_labels": np.arange(3)[:, None], "meta": np.ones(1)}
    np.savez(tmp_path / "a.npz", **arrays)
    splits = load(data=str(tmp_path / "a.npz"))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [30, 3, 6]
    assert [splits.val[i][1] for i in range(3)] == [0, 1, 2]
    assert splits.notes == ("skipped, none of a split's arrays: 'meta'",)
    assert splits.drawn_from == ""
    np.savez(tmp_path / "a.npz", **arrays, val_images=arrays["valid_images"])
    with pytest.raises(ValueError, match="valid_images and val_images are both the val split's"):
        load(data=str(tmp_path / "a.npz"))
    del arrays["valid_labels"]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match="val_labels missing"):
        load(data=str(tmp_path / "a.npz"))


def test_equal_images_of_two_splits_are_said(tmp_path):
    arrays = _slice()
    arrays["test_images"][4] = arrays["train_images"][7]
    np.savez(tmp_path / "a.npz", **arrays)
    assert load(data=str(tmp_path / "a.npz")).notes == (
        "warning: 1 of 6 test images is the same as one of train: test image 4 and train image 7",
    )


def test_the_seed_decides_the_slice_of_an_npz(tmp_path):
    np.savez(tmp_path / "a.npz", **_slice())

    def val(seed):
        return load(data=str(tmp_path / "a.npz"), seed=seed).val.items.images.tobytes()

    assert val(0) == val(0) != val(1)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"test_labels": None}, "expected arrays train_images, .*, test_labels missing"),
        ({"train_images": np.zeros((30, 5, 4))}, r"train_images: expected uint8 or uint16 .* got float64 \[30, 5, 4\]"),
        ({"test_images": np.zeros((6, 3, 5, 4), np.uint8)}, r"test_images: expected .* got uint8 \[6, 3, 5, 4\]"),
        ({"train_labels": np.arange(29)}, r"train_labels: expected one whole number for each of 30 images.* \[29\]"),
        ({"test_labels": np.zeros(6)}, "test_labels: expected one whole number .* got float64"),
        ({"test_labels": np.array([0, 1, -1, 0, 0, 0])}, "test_labels: expected 0 or more, got -1 at index 2"),
        (
            {"test_images": np.zeros((0, 5, 4), np.uint8), "test_labels": np.zeros(0, int)},
            "test_labels: .* at least one",
        ),
        ({"test_labels": np.full(6, 2**40)}, "test_labels: expected less than 1,048,576, got 1099511627776 at index 0"),
        ({"train_labels": np.array([{}] * 30)}, "train_labels.npy holds Python objects"),
    ],
)
def test_a_bad_array_is_named_with_the_file(tmp_path, change, error):
    arrays = {name: array for name, array in (_slice() | change).items() if array is not None}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"data: .*/a\.npz( is damaged or no .npz archive)?: {error}"):
        load(data=str(tmp_path / "a.npz"))


def test_a_file_that_is_no_npz_or_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .*/b\.npz does not exist"):
        load(data=str(tmp_path / "b.npz"))
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match=r"data: .*/b\.npz is damaged or no .npz archive: "):
        load(data=str(tmp_path / "b.npz"))
    np.savez(tmp_path / "b.npz", **_slice())
    whole = (tmp_path / "b.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"data: .*/b\.npz is damaged or no .npz archive: "):
        load(data=str(tmp_path / "b.npz"))
