"""Datasets in memory: digits, Fashion-MNIST and ``.npz`` files."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from rlrr_kernels.finetune.data.folder import SPLITS, split_of
from rlrr_kernels.finetune.data.images import scaled
from rlrr_kernels.finetune.data.parts import Parts, equal_arrays, numbered, set_aside
from rlrr_kernels.io.reading import npz_arrays, npz_headers

#: Largest number of images in a file of Fashion-MNIST.
IDX_IMAGES = 60_000

#: Largest number of classes of an ``.npz`` file, which has no list of them.
NPZ_CLASSES = 2**20

#: Names of the labels by Fashion-MNIST's authors.
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Arrays(Dataset[tuple[Image.Image, int]]):
    """Images in memory: uint8 or uint16 ``[count, H, W]`` or ``[count, H, W, 3]``, and labels ``[count]``.

    uint16 images are scaled to 8 bits when they are read.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.images[index]
        return Image.fromarray(pixels if pixels.dtype == np.uint8 else scaled(pixels)), int(self.labels[index])

    def part(self, indices: list[int]) -> Arrays:
        """Select images by index."""
        return Arrays(self.images[indices], self.labels[indices])


def read_digits(seed: int) -> Parts:
    """Read scikit-learn's 1,797 handwritten digits of 8x8 pixels: 800 to train, 200 to validate, 797 to test.

    The split is stratified, with the sizes of VTAB-1k. The seed decides which of the first 1,000 validate.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    digits = Arrays((images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8), labels)
    index = np.arange(len(labels))
    seen, test = train_test_split(index, train_size=1000, stratify=labels, random_state=0)
    train, val = train_test_split(seen, train_size=800, stratify=labels[seen], random_state=seed)
    return Parts(digits.part(train), digits.part(val), digits.part(test), numbered(10))


def read_fashion_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read one split (``train`` or ``t10k``) of the original IDX files.

    Returns:
        uint8 images ``[count, 1, 28, 28]`` and int64 labels ``[count]``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the numbers of images and labels differ.
    """

    def read(name: str, header: int, size: int) -> np.ndarray:
        path = folder / f"{split}-{name}-ubyte.gz"
        if not path.is_file():
            raise FileNotFoundError(
                f"Fashion-MNIST file {path} is missing (Debian package dataset-fashion-mnist, or --data-root)"
            )
        try:
            with gzip.open(path) as file:
                # bounded by the size of the original, as a file may unpack to anything
                data = file.read(header + IDX_IMAGES * size)
                if file.read(1):
                    raise ValueError(f"expected at most {IDX_IMAGES} of {size} bytes each")
            count = struct.unpack_from(">I", data, 4)[0] if len(data) >= header else -1
            if len(data) != header + count * size:
                raise ValueError(f"expected {max(count, 0)} of {size} bytes each, as its header says")
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"Fashion-MNIST file {path} is damaged: {error}") from error
        return np.frombuffer(data, np.uint8, offset=header)

    images = read("images-idx3", 16, 28 * 28).reshape(-1, 1, 28, 28)
    labels = read("labels-idx1", 8, 1).astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"Fashion-MNIST in {folder}: {len(images)} images but {len(labels)} labels")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels)


def read_fashion_mnist_parts(folder: Path, seed: int) -> Parts:
    """Read the 60,000 training images, a fifth of each class set aside by the seed, and the 10,000 test images."""
    seen, test = (
        Arrays(images[:, 0].numpy(), labels.numpy())
        for images, labels in (read_fashion_mnist(folder, split) for split in ("train", "t10k"))
    )
    kept, aside = set_aside(seen.labels.tolist(), seed)
    return Parts(seen.part(kept), seen.part(aside), test, FASHION_MNIST_CLASSES, drawn_from="its training images")


def read_npz(file: Path, seed: int) -> Parts:
    """Read ``{train,val,test}_{images,labels}`` from one file; a split may have any name in :data:`~.folder.SPLITS`.

    Images are uint8 or uint16 ``[count, H, W]`` or ``[count, H, W, C]`` with C 1 or 3; labels are whole numbers from
    0, ``[count]`` or ``[count, 1]``, and the largest defines the number of classes. Without validation images a fifth
    of each class is set aside by the seed.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is damaged, or an array is missing, there twice, or has another shape or dtype.
    """
    if not file.is_file():
        raise FileNotFoundError(f"data: {file} does not exist")
    try:
        headers = npz_headers(file)
        names = _named(headers, file)
        loaded = npz_arrays(file, [name for pair in names.values() for name in pair])
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    try:
        found = {split: _checked(loaded, *pair) for split, pair in names.items()}
    except ValueError as error:
        raise ValueError(f"data: {file}: {error}") from error
    unread = sorted(headers.keys() - loaded.keys())
    notes = [f"skipped, none of a split's arrays: {', '.join(map(repr, unread[:8]))}"] if unread else []
    ordered = [split for split in SPLITS if split in found]
    for i, split in enumerate(ordered):
        for earlier in ordered[:i]:
            notes += equal_arrays(found[earlier].images, found[split].images, (earlier, split))
    classes = numbered(1 + int(max(part.labels.max() for part in found.values())))
    train, val, test = found["train"], found.get("val"), found["test"]
    drawn_from = "" if val else names["train"][0]
    if val is None:
        kept, aside = set_aside(train.labels.tolist(), seed)
        train, val = train.part(kept), train.part(aside)
    return Parts(train, val, test, classes, notes=tuple(notes), drawn_from=drawn_from, named=False)


def _named(names: Iterable[str], file: Path) -> dict[str, tuple[str, str]]:
    """Find the names of the images and labels of each split.

    Raises:
        ValueError: If one is missing, or two belong to one split.
    """
    found: dict[tuple[str, str], str] = {}
    for name in names:
        split, _, what = name.rpartition("_")
        key = split_of(split) or "", what
        if key[0] and what in ("images", "labels") and found.setdefault(key, name) != name:
            raise ValueError(f"{file}: {found[key]} and {name} are both the {key[0]} split's, expected one of them")
    splits = [split for split in SPLITS if split != "val" or (split, "images") in found or (split, "labels") in found]
    wanted = {split: (f"{split}_images", f"{split}_labels") for split in splits}
    missing = [name for split in splits for name in wanted[split] if (split, name.rpartition("_")[2]) not in found]
    if missing:
        expected = ", ".join(name for pair in wanted.values() for name in pair)
        raise ValueError(f"{file}: expected arrays {expected}, {', '.join(missing)} missing")
    return {split: (found[split, "images"], found[split, "labels"]) for split in splits}


def _checked(arrays: dict[str, np.ndarray], images_name: str, labels_name: str) -> Arrays:
    images, labels = arrays[images_name], arrays[labels_name]
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = images.dtype.kind == "u" and images.dtype.itemsize <= 2
    if not whole or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
        raise ValueError(
            f"{images_name}: expected uint8 or uint16 [count, H, W], [count, H, W, 1] or [count, H, W, 3], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu" or len(labels) == 0:
        raise ValueError(
            f"{labels_name}: expected one whole number for each of {len(images)} images, at least one, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if labels.min() < 0:
        raise ValueError(f"{labels_name}: expected 0 or more, got {labels.min()} at index {labels.argmin()}")
    if labels.max() >= NPZ_CLASSES:
        raise ValueError(
            f"{labels_name}: expected less than {NPZ_CLASSES:,}, got {labels.max()} at index {labels.argmax()}"
        )
    return Arrays(images, labels)
